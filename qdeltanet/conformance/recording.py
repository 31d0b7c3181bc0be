"""An arithmetic that remembers its codes, so that two runs can be compared site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core import Backend, IntegerArithmetic, Operand, RuleScheme, Term


class Recording(IntegerArithmetic):
    """Remembers what entered every site, in order. With `fused=False` the backend's fused kernels are not used."""

    def __init__(
        self, scheme: RuleScheme, scales: Mapping[str, Tensor], backend: Backend, *, fused: bool = False, **options: Any
    ) -> None:
        super().__init__(scheme, scales, backend, **options)
        self.fuses = fused
        self.kernels_run: list[str] = []
        self.seen: list[tuple[str, Tensor, Tensor | None]] = []

    def _remember(self, operand: Operand) -> Operand:
        scale = None if operand.scale is None else operand.scale.detach()
        self.seen.append((operand.site, operand.codes.detach(), scale))
        return operand

    def quantize(self, site: str, x: Tensor) -> Operand:
        return self._remember(super().quantize(site, x))

    def store(self, site: str, terms: Sequence[Term], **options: Any) -> Operand:
        return self._remember(super().store(site, terms, **options))

    def fused(self, kernel: str, *arguments: Any) -> Any:
        result = super().fused(kernel, *arguments) if self.fuses else None
        if result is not None:
            self.kernels_run.append(kernel)
        return result


def differing(a: Recording, b: Recording) -> dict[str, int]:
    """Elements (codes and scales) by site that differ between two runs of one dataflow."""
    assert [s for s, _, _ in a.seen] == [s for s, _, _ in b.seen]
    found: dict[str, int] = {}
    for (site, codes, scale), (_, other, other_scale) in zip(a.seen, b.seen, strict=True):
        n = int((codes.double() != other.double()).sum())
        if scale is not None and other_scale is not None:
            n += int((scale != other_scale).sum())
        if n:
            found[site] = found.get(site, 0) + n
    return found
