"""``adapter_config.json``: the fields that change a merge, checked; the rest ignored or refused.

Sources: PEFT 0.21 (``LoraConfig``). A field that is null, false or empty says nothing and is ignored,
known or not. A field that is set is read, known not to matter, or a reason to refuse the adapter: a
variant that is not known here may mean anything.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from effic.ir.errors import InvalidModelError

CONFIG_BYTES = 1 << 20
# Longer ones are no names of fields, and are cut in messages.
_NAME_LENGTH = 80

METHODS: dict[str, Literal["lora", "paca", "s2ft", "svfit", "l4q"]] = {
    "LORA": "lora",
    "PACA": "paca",
    "S2FT": "s2ft",
    "SVFIT": "svfit",
    "L4Q": "l4q",
}

# Training, provenance, or where adapters go: what they went to is in the tensors' names. The configs of
# initialisations matter only through init_lora_weights.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "paca_dropout", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip

_READ = {
    "alpha_pattern", "bias", "bits", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights",
    "lora_alpha", "lora_bias", "modules_to_save", "paca_alpha", "r", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip

_REFUSED = {
    "arrow_config": "routes every token to adapters of its own, which no single weight can",
    "alora_invocation_tokens": "acts on a part of the sequence only, which no single weight can",
    "layer_replication": "repeats layers of the base; merge into a base that has them repeated and unshared",
    "use_qalora": "pools the inputs of A, which is not supported",
}

# What PEFT puts around the patterns of rank_pattern and alpha_pattern.
_AROUND = r"^(.*\.)?({})$"

# These leave the base weight as it is; training starts beside it.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}
# These subtract the adapter they start from, so that the base is not the original model's.
_BASE_INITS = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga|mica")

# A pattern that takes longer than this on a path could be made to take for ever.
_PATTERN_LENGTH = 300
_PATTERN_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an adapter's configuration says.

    Attributes:
        method: which family the tensors are of.
        r: rank where no pattern says otherwise.
        alpha: α, likewise.
        rank_pattern: ranks by regular expression on the module path.
        alpha_pattern: α likewise.
        use_rslora: σ = α/√r.
        use_dora: weights are rescaled to magnitudes.
        fan_in_fan_out: the framework stored weights as ``[in, out]``.
        lora_bias: B has a bias.
        bias: which biases of the base were trained.
        init: True, or how training changed the base weight before it began.
        modules_to_save: modules that are replaced as a whole.
        token_indices: rows of embeddings that are replaced; by module, or one list for all.
        target_parameters: parameters (stacks of expert weights) that are adapted themselves.
        ensure_weight_tying: whether a tied pair was adapted as one.
        bits: of an L4Q export.
    """

    method: Literal["lora", "paca", "s2ft", "svfit", "l4q"]
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    lora_bias: bool
    bias: str
    init: str | bool
    modules_to_save: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...]
    target_parameters: tuple[str, ...]
    ensure_weight_tying: bool
    bits: int

    def rank_of(self, path: str) -> int:
        """r of a module."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def alpha_of(self, path: str) -> float:
        """α of a module."""
        return float(_by_pattern(self.alpha_pattern, path, self.alpha))

    def scaling(self, alpha: float, rank: int) -> float:
        """σ, the factor on B·A."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    for pattern, value in patterns.items():
        if re.match(_AROUND.format(pattern), path):
            return value
    return otherwise


def read_settings(text: bytes, where: str) -> Settings:
    """Check a configuration.

    Args:
        text: the JSON file's content.
        where: the file, for messages.

    Raises:
        InvalidModelError: it is no JSON object, a field has a wrong type, or the adapter is of a kind
            that cannot be merged; the field is named.
    """
    try:
        config = json.loads(text, object_pairs_hook=_without_doubles)
    except _TwiceError as error:
        raise InvalidModelError(f"{where} has the field {error} twice; say which is meant.") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(f"{where} is no JSON text; copy the adapter again.") from error
    if not isinstance(config, dict):
        raise InvalidModelError(f"{where} is no table of fields; copy the adapter again.")
    fields = _Fields(config, where)
    kind = fields.text("peft_type", "")
    if kind.upper() not in METHODS:
        raise InvalidModelError(
            f"{where}: peft_type is {kind or None!r}; adapters of type {', '.join(METHODS)} can be merged."
        )
    method = METHODS[kind.upper()]
    for key, value in config.items():
        if not value or key in _HARMLESS or key in _READ:
            continue
        reason = _REFUSED.get(key, "is set, and what it means is not known here")
        name = key if key.isidentifier() and len(key) < _NAME_LENGTH else f"{key!r:.80}"
        raise InvalidModelError(f"{where}: {name} {reason}, so the adapter cannot be merged.")
    alpha = fields.number("paca_alpha" if method == "paca" and "paca_alpha" in config else "lora_alpha", 8.0)
    return Settings(
        method=method,
        r=fields.integer("r", 8),
        alpha=alpha,
        rank_pattern={_pattern(k, where): fields.checked_rank(v) for k, v in fields.table("rank_pattern")},
        alpha_pattern={
            _pattern(k, where): fields.checked_number(v) for k, v in fields.table("alpha_pattern")
        },
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        lora_bias=fields.flag("lora_bias"),
        bias=fields.choice("bias", ("none", "all", "lora_only")),
        init=_init(config.get("init_lora_weights", True), where),
        modules_to_save=fields.texts("modules_to_save"),
        token_indices=_token_indices(config.get("trainable_token_indices"), where),
        target_parameters=fields.texts("target_parameters"),
        ensure_weight_tying=fields.flag("ensure_weight_tying"),
        bits=fields.integer("bits", 4),
    )


@dataclasses.dataclass(frozen=True)
class _Fields:
    """A JSON object, read field by field with the types checked."""

    config: dict[str, Any]
    where: str

    def wrong(self, key: str, expected: str) -> InvalidModelError:
        return InvalidModelError(f"{self.where}: {key} is {self.config.get(key)!r:.80}, expected {expected}.")

    def text(self, key: str, default: str) -> str:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def integer(self, key: str, default: int) -> int:
        value = self.config.get(key)
        if value is None:
            return default
        if type(value) is not int or not 1 <= value <= 1 << 20:
            raise self.wrong(key, "a whole number from 1")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key)
        return default if value is None else self.checked_number(value, key)

    def checked_number(self, value: Any, key: str = "alpha_pattern") -> float:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self.wrong(key, "a finite number")
        return float(value)

    def checked_rank(self, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= 1 << 20:
            raise self.wrong("rank_pattern", "whole numbers from 1")
        return value

    def table(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key)
        if value is None:
            return []
        if not isinstance(value, dict):
            raise self.wrong(key, "a table")
        return list(value.items())

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, f"one of {', '.join(allowed)}")
        return value


class _TwiceError(ValueError):
    """A name is in a table twice, and readers differ in which of the two they take."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _TwiceError(f"{key!r:.80}")
        table[key] = value
    return table


def _pattern(pattern: str, where: str) -> str:
    """A regular expression on module paths, refused where it could run for ever."""
    repeats = len(re.findall(r"[*+{]", re.sub(r"\\.", "", pattern)))
    if len(pattern) > _PATTERN_LENGTH or repeats > _PATTERN_REPEATS or re.search(r"\)[*+{]", pattern):
        raise InvalidModelError(f"{where}: the pattern {pattern!r:.80} repeats too much; write it out.")
    try:
        # By itself too: "a)|(b" is one only between brackets.
        re.compile(pattern)
        re.compile(_AROUND.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidModelError(f"{where}: the pattern {pattern!r:.80} is no regular expression.") from error
    return pattern


def _init(value: Any, where: str) -> str | bool:
    if value is None or isinstance(value, bool):
        return True
    name = value.lower() if isinstance(value, str) else ""
    if name in _PLAIN_INITS:
        return True
    if _BASE_INITS.fullmatch(name):
        return name
    raise InvalidModelError(
        f"{where}: init_lora_weights is {value!r:.80}, and whether that changed the base is not known here."
    )


def _token_indices(value: Any, where: str) -> Mapping[str, tuple[int, ...]] | tuple[int, ...]:
    def rows(found: Any) -> tuple[int, ...]:
        if not isinstance(found, list) or not all(type(v) is int and 0 <= v < 1 << 62 for v in found):
            raise InvalidModelError(f"{where}: trainable_token_indices are no lists of row numbers.")
        if len(set(found)) != len(found):
            raise InvalidModelError(f"{where}: trainable_token_indices name a row twice.")
        return tuple(found)

    if not value:
        return ()
    if isinstance(value, dict):
        return {name: rows(found) for name, found in value.items()}
    return rows(value)
