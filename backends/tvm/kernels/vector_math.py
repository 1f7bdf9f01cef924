"""exp, log, erf, tanh and the logistic function as plain arithmetic that vectorises.

LLVM turns ``exp`` of a vector into one call of libm per lane, which costs more than everything around
it. The expressions here take a scalar or a vector of float32 and are only additions, multiplications,
selects and shifts of bits, so that a vectorised loop stays one.

Errors below are against float64 over every tenth of a binade, in units in the last place of float32.
NaN gives NaN; infinities, zeros and saturation are those of C. Sources: ``exp`` and ``log`` are the
polynomials of the Cephes library (S. Moshier, netlib.org/cephes: expf, logf); ``erf`` and ``tanh`` are
the rational minimax forms that Eigen and XLA use (``generic_fast_erf``, ``generic_fast_tanh``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tvm import ir, tirx
from tvm.tirx import op

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LOG2_E = 1.44269504088896341
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_ERF_TOP = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BOTTOM = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_TANH_TOP = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_BOTTOM = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

_numbers = itertools.count()


def lanes(x: Any) -> int:
    """How many elements an expression has: 1 for a scalar."""
    return int(x.ty.dtype.lanes)


def splat(value: float, like: Any, dtype: str = "float32") -> Any:
    """A constant in every lane of ``like``."""
    count = lanes(like)
    scalar = tirx.const(value, dtype)
    return scalar if count == 1 else tirx.Broadcast(scalar, count)


def _typed(dtype: str, like: Any) -> str:
    count = lanes(like)
    return dtype if count == 1 else f"{dtype}x{count}"


_MOST_NAMES = 8
"""With more names in its argument a call stays one: the time to compile doubles with each name within another,
and the tanh of the logarithm of an exponential (Mish, written out) would take minutes."""


def share(value: Any, use: Callable[[Any], Any]) -> Any:
    """``use(value)`` with the value computed once."""
    variable = tirx.Var(f"t{next(_numbers)}", value.ty)
    return tirx.Let(variable, value, use(variable))


def _polynomial(x: Any, factors: Sequence[float]) -> Any:
    """The polynomial in ``x``, factor of the highest power first, by Horner's rule."""
    total = splat(factors[0], x)
    for factor in factors[1:]:
        total = total * x + splat(factor, x)
    return total


def _between(x: Any, low: float, high: float) -> Any:
    """``x`` held between two bounds. By selects: the simplifier may turn round the operands of min and
    max, and then a NaN becomes a bound."""
    return tirx.Select(x < splat(low, x), splat(low, x), tirx.Select(x > splat(high, x), splat(high, x), x))


def _two_to(n: Any) -> Any:
    """2 to the power of an integer in -126 … 127, by its bits."""
    bits = op.shift_left(n + splat(127, n, "int32"), splat(23, n, "int32"))
    return op.reinterpret(_typed("float32", n), bits)


def exp(x: Any) -> Any:
    """e to the power of x; error below 1 unit in the last place (2 below 2**-126)."""

    def scaled(r: Any, n: Any) -> Any:
        # Two factors, since 2**n alone is out of range just where the result is subnormal or infinite.
        value = _polynomial(r, _EXP) * (r * r) + r + splat(1.0, r)
        return share(
            op.shift_right(n, splat(1, n, "int32")), lambda half: value * _two_to(half) * _two_to(n - half)
        )

    def reduced(x: Any, n: Any) -> Any:
        r = x - n * splat(_LN2_HIGH, x) - n * splat(_LN2_LOW, x)
        return share(r, lambda r: share(tirx.Cast(_typed("int32", x), n), lambda i: scaled(r, i)))

    def bounded(x: Any) -> Any:
        return share(op.nearbyint(x * splat(_LOG2_E, x)), lambda n: reduced(x, n))

    return share(x, lambda x: share(_between(x, -104.0, 89.0), bounded))


def exp_below_one(x: Any) -> Any:
    """e to the power of x ≤ 0, as softmax needs it: a third fewer operations than :func:`exp`.

    Results below 2**-126 are 0 (their neighbour in the row is 1).
    """

    def reduced(x: Any, n: Any) -> Any:
        r = x - n * splat(_LN2_HIGH, x) - n * splat(_LN2_LOW, x)
        return share(
            r,
            lambda r: (
                (_polynomial(r, _EXP) * (r * r) + r + splat(1.0, r))
                * _two_to(tirx.Cast(_typed("int32", x), n))
            ),
        )

    def every(x: Any) -> Any:
        low = splat(-87.33, x)
        inside = tirx.Select(x < low, low, x)
        value = share(inside, lambda x: share(op.nearbyint(x * splat(_LOG2_E, x)), lambda n: reduced(x, n)))
        return tirx.Select(x < low, splat(0.0, x), value)

    return share(x, every)


def log(x: Any) -> Any:
    """The natural logarithm; error below 1 unit in the last place; -Inf at 0, NaN below."""
    tiny = 1.17549435e-38

    def finish(f: Any, e: Any) -> Any:
        z = f * f
        y = f * z * _polynomial(f, _LOG) + e * splat(_LN2_LOW, f) - z * splat(0.5, f)
        return f + y + e * splat(_LN2_HIGH, f)

    def normal(x: Any, correction: Any) -> Any:
        kind = _typed("int32", x)
        bits = op.reinterpret(kind, x)

        def split(bits: Any) -> Any:
            # Mantissa between sqrt(1/2) and sqrt(2): subtract the bits of sqrt(1/2), keep the exponent.
            e = op.shift_right(bits - splat(0x3F3504F3, bits, "int32"), splat(23, bits, "int32"))

            def parts(e: Any) -> Any:
                f = op.reinterpret(_typed("float32", x), bits - op.shift_left(e, splat(23, e, "int32")))
                return share(
                    f - splat(1.0, x),
                    lambda f: finish(f, tirx.Cast(_typed("float32", x), e) + correction),
                )

            return share(e, parts)

        return share(bits, split)

    def every(x: Any) -> Any:
        small = x < splat(tiny, x)
        scaled = tirx.Select(small, x * splat(2.0**25, x), x)
        correction = tirx.Select(small, splat(-25.0, x), splat(0.0, x))
        value = share(scaled, lambda s: normal(s, correction))
        infinite = tirx.Select(x > splat(3.4028234663852886e38, x), x, value)
        # A comparison with NaN is false: x itself is what is left for it.
        below = tirx.Select(
            x < splat(0.0, x), splat(float("nan"), x), tirx.Select(x > splat(0.0, x), infinite, x)
        )
        zero = splat(0.0, x)
        return tirx.Select(tirx.EQ(x, zero), splat(float("-inf"), x), below)

    return share(x, every)


def erf(x: Any) -> Any:
    """The error function; relative error below 5e-7 (4 units), exactly ±1 from ±4 on."""

    def ratio(x: Any) -> Any:
        return share(x * x, lambda z: x * _polynomial(z, _ERF_TOP) / _polynomial(z, _ERF_BOTTOM))

    return share(x, lambda x: share(_between(x, -4.0, 4.0), ratio))


def tanh(x: Any) -> Any:
    """The hyperbolic tangent; relative error below 5e-7 (4 units)."""

    def ratio(x: Any) -> Any:
        return share(x * x, lambda z: x * _polynomial(z, _TANH_TOP) / _polynomial(z, _TANH_BOTTOM))

    def every(x: Any) -> Any:
        value = share(_between(x, -7.90531110763549805, 7.90531110763549805), ratio)
        return tirx.Select(x > splat(-4e-4, x), tirx.Select(x < splat(4e-4, x), x, value), value)

    return share(x, every)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x)); error below 3 units in the last place."""
    return splat(1.0, x) / (splat(1.0, x) + exp(splat(0.0, x) - x))


def _names(value: Any) -> int:
    """How many names a value gives to parts of it."""
    import tvm_ffi

    found: list[Any] = []
    tvm_ffi.structural_walk(value, (tirx.Let, found.append))
    return len(found)


def _power(x: Any, exponent: Any) -> Any | None:
    """Small whole powers by multiplication; None for others, which libm computes better than we do."""
    value = exponent.value if isinstance(exponent, tirx.FloatImm) else None
    if value == 1.0:
        return x
    if value == 2.0:
        return share(x, lambda x: x * x)
    if value == 3.0:
        return share(x, lambda x: x * x * x)
    if value == -1.0:
        return splat(1.0, x) / x
    return None


_ONE_ARGUMENT: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": exp,
    "tirx.log": log,
    "tirx.erf": erf,
    "tirx.tanh": tanh,
    "tirx.sigmoid": sigmoid,
}


def replace_calls(body: Any) -> Any:
    """A statement with every call of these functions on float32 replaced by its arithmetic."""
    import tvm_ffi

    def replaced(call: Any) -> Any:
        # What a sorting function is handed is a call too: of a pointer, which has no element type.
        if not isinstance(call.op, ir.Op) or not call.args or str(getattr(call.ty, "dtype", "")) != "float32":
            return call
        if make := _ONE_ARGUMENT.get(call.op.name):
            return call if _names(call.args[0]) > _MOST_NAMES else make(call.args[0])
        if call.op.name == "tirx.pow":
            power = _power(call.args[0], call.args[1])
            return call if power is None else power
        return call

    return tvm_ffi.structural_map(body, [(ir.Call, replaced), ((tirx.Max, tirx.Min), _with_nan)])


def _with_nan(bound: Any) -> Any:
    """A maximum or minimum of floats that lets NaN through, whichever side it is on. LLVM's own returns the
    other side."""
    dtype = str(bound.ty.dtype)
    if not dtype.startswith("float"):
        return bound
    upwards = isinstance(bound, tirx.Max)

    def within(x: Any, limit: Any) -> Any:
        # A comparison with NaN fails, and then the value that may be one is taken.
        return tirx.Select(x < limit if upwards else x > limit, limit, x)

    for x, limit in ((bound.a, bound.b), (bound.b, bound.a)):
        if isinstance(limit, tirx.FloatImm):
            return share(x, partial(within, limit=limit))

    def larger(a: Any, b: Any) -> Any:
        return tirx.Select(op.isnan(b), b, within(a, b))

    # Values of memory are not named: TVM's search for common expressions fails on names within names, its
    # vectorizer on a name for a single number, and LLVM reads them once.
    def named(value: Any, use: Callable[[Any], Any]) -> Any:
        return use(value) if isinstance(value, ir.TensorLoad) else share(value, use)

    return named(bound.a, lambda a: named(bound.b, lambda b: larger(a, b)))
