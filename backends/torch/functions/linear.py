"""Products of matrices."""

from __future__ import annotations

from torch import Tensor


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, trans_a: bool, trans_b: bool
) -> Tensor:
    """``alpha · A' · B' + beta · C`` with any numbers; the plain case is ``linear`` or ``addmm``."""
    left, right = a.t() if trans_a else a, b.t() if trans_b else b
    product = left @ right
    if alpha != 1.0:
        product = product * alpha
        if product.dtype != a.dtype:
            product = product.to(a.dtype)
    if c is None or beta == 0.0:
        return product
    scaled = c if beta == 1.0 else (c * beta).to(a.dtype)
    return product + scaled
