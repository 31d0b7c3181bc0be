"""The judge: int64 throughout, one definition, no tricks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..core import FloatContainers, Granularity, IntFormat, Mode, Result, Term, exact_matmul


class ReferenceBackend(FloatContainers):
    """Codes, accumulators and wide accumulators as int64."""

    name = "reference"

    def matmul(self, left: Tensor, right: Tensor, bound: int, code_max: int) -> Tensor:
        return exact_matmul(left, right)

    def multiply(self, acc: Tensor, coefficient: Tensor, bound: int) -> Tensor:
        return acc.long() * coefficient.long()

    def requantize(
        self,
        terms: Sequence[Term],
        fmt: IntFormat,
        out_scale: Tensor | Granularity,
        *,
        mode: Mode = "float",
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Result:
        result = super().requantize(terms, fmt, out_scale, mode=mode, shape=shape, mask=mask, compact=compact)
        return replace(result, codes=result.codes.long())
