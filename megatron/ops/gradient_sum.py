"""Accumulation of parameter gradients over many calls, in fp32 for any parameter dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class GradientSum:
    """An accumulated gradient: `total` in fp32 (fp64 for fp64), or None if nothing was added."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add one contribution."""
        if self.total is None:
            self.total = gradient.to(accumulation_dtype(gradient.dtype), copy=True)
        else:
            self.total.add_(gradient)

    def add_product(self, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Add the weight gradient dy^T x [O, I] of a linear layer over T tokens, not rounded to half precision."""
        dy_OT, dtype = dy_TO.T, accumulation_dtype(dy_TO.dtype)
        if not (dy_TO.is_cuda and dy_TO.dtype.itemsize == 2):
            dy_OT, x_TI = dy_OT.to(dtype), x_TI.to(dtype)
            self.total = dy_OT @ x_TI if self.total is None else self.total.addmm_(dy_OT, x_TI)
        elif self.total is None:
            self.total = torch.mm(dy_OT, x_TI, out_dtype=dtype)
        elif _adds_products_in_fp32(dy_TO.device, dy_TO.dtype):
            torch.addmm(self.total, dy_OT, x_TI, out_dtype=dtype, out=self.total)
        else:
            self.total.add_(torch.mm(dy_OT, x_TI, out_dtype=dtype))


class GradientSums:
    """One `GradientSum` per parameter."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._sums = [GradientSum() for _ in parameters]
        self._by_parameter = {id(p): each for p, each in zip(parameters, self._sums, strict=True)}

    def of(self, parameter: Tensor) -> GradientSum | None:
        """Return the sum of a parameter, or None if the parameter has none here."""
        return self._by_parameter.get(id(parameter))

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one contribution per parameter; None for no contribution."""
        for gradient_sum, gradient in zip(self._sums, gradients, strict=True):
            if gradient is not None:
                gradient_sum.add(gradient)

    def result(self, scale: Tensor | None = None) -> list[Tensor | None]:
        """Return the sums in the dtypes of the parameters, times `scale` if given, and release them."""
        results: list[Tensor | None] = []
        for parameter, gradient_sum in zip(self.parameters, self._sums, strict=True):
            total, gradient_sum.total = gradient_sum.total, None
            if total is not None and scale is not None:
                total.mul_(scale)
            results.append(None if total is None else total.to(parameter.dtype))
        return results


@functools.cache
def _adds_products_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch's addmm adds half-precision products to an fp32 sum; not every version since 2.8 does."""
    matrix = torch.zeros(8, 8, dtype=dtype, device=device)
    total = torch.zeros(8, 8, device=device)
    try:
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True
