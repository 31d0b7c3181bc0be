"""Candidates on the matrices that a layer's inverse was given: static scales, and the error of T."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core import RuleScheme
from ...delta_rule import LayerScheme
from ...delta_rule.laboratory import (
    InverseScheme,
    exact_inverse,
    invert_integer,
    observe_ranges,
    relative_errors,
    static_scales,
)
from ...inverse import INPUT


@dataclass(frozen=True)
class Systems:
    """Matrices of one layer [M, H, C, C], float64: every second one calibrates, the others measure.

    exact: inverses of `measuring`. limit: what |A_ij| and |T_ij| stay within.
    """

    calibrating: Tensor
    measuring: Tensor
    exact: Tensor
    limit: float | None = 1.0

    @classmethod
    def of(cls, A: Tensor, limit: float | None = 1.0) -> Systems:
        """A: [H, M, C, C]; a single matrix per head serves for both."""
        chunks = A.transpose(0, 1).contiguous()
        measuring = chunks[1::2] if len(chunks) > 1 else chunks
        return cls(chunks[::2], measuring, exact_inverse(measuring), limit)

    def scales(self, scheme: LayerScheme) -> tuple[RuleScheme, dict[str, Tensor]]:
        """The inverse's bound scheme, and static scales of A, T and registers. Raises BindingError."""
        assert scheme.rule is not None
        rule, held = scheme.rule, scheme.rule.sites[INPUT]
        chosen = InverseScheme(
            held, rule.sites, scheme.shared_rescale, scheme.headroom, self.limit, rule.requantize, rule.accumulator_bits
        )
        bound = chosen.bound(scheme.plan)
        return bound, static_scales(scheme.plan, chosen, bound, observe_ranges(scheme.plan, bound, self.calibrating))

    def error(self, scheme: LayerScheme) -> float:
        """Root mean square over matrices of the relative Frobenius error of T; infinite where T overflows."""
        found = invert_integer(scheme.plan, *self.scales(scheme), self.measuring)
        return float(relative_errors(found.T, self.exact).square().mean().sqrt())
