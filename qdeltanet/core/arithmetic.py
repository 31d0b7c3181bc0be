"""The arithmetics: one dataflow runs over any of them.

`FloatArithmetic` multiplies real numbers, `ObservingArithmetic` shows every site to an observer on the way,
`IntegerArithmetic` (integer.py) multiplies codes on a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from .operand import Operand, block_part, repeat_heads, sub_blocks
from .scheme import Decay
from .terms import Region, Term, place


class Arithmetic(Protocol):
    """Five verbs; a dataflow written in them runs in float, fake quantization and integers.

    decay: how the front end makes decay out of its logarithm. rotate: what it rotates (`RuleScheme.rotate`).
    """

    @property
    def decay(self) -> Decay: ...

    @property
    def rotate(self) -> frozenset[str]: ...

    def quantize(self, site: str, x: Tensor) -> Operand:
        """A float32 tensor [..., H, R, C] enters at a site."""
        ...

    def product(
        self,
        left: Operand,
        right: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        parts: tuple[Region, Region] | None = None,
        size: int = 0,
    ) -> Term:
        """left @ right, times a data-dependent coefficient in [0, 2] where given.

        parts: rows and columns of left and of right that take part, where the rest is known to be zero, of their
        diagonal blocks of `size` (or larger registers' smaller blocks, put together to that size); region: rows
        and columns of the output that the product then covers.
        """
        ...

    def addend(
        self,
        x: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        size: int | None = None,
    ) -> Term:
        """An operand as a summand.

        size: x is a compact register of smaller blocks than the output's, which have this size.
        """
        ...

    def store(
        self,
        site: str,
        terms: Sequence[Term],
        *,
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Operand:
        """Sum of terms into a site."""
        ...

    def fused(self, kernel: str, *arguments: Any) -> Any:
        """What a fused kernel of the backend makes of the arguments; None where the steps have to run one by one."""
        ...

    def read(self, terms: Sequence[Term]) -> Tensor:
        """Sum of terms as float32."""
        ...


class FloatArithmetic:
    """Real numbers throughout: nothing is rounded to codes."""

    decay: Decay = "exp"
    rotate: frozenset[str] = frozenset()

    def quantize(self, site: str, x: Tensor) -> Operand:
        return Operand(site, x)

    def product(
        self,
        left: Operand,
        right: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        parts: tuple[Region, Region] | None = None,
        size: int = 0,
    ) -> Term:
        if parts is not None:
            left, right = block_part(left, size, *parts[0]), block_part(right, size, *parts[1])
        acc = left.codes @ right.codes
        if coefficient is not None:
            acc = repeat_heads(acc, coefficient.shape[-3]) * coefficient
        return Term(acc, sign=sign, region=region)

    def addend(
        self,
        x: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        size: int | None = None,
    ) -> Term:
        if size is not None:
            return Term(sub_blocks(x.codes, size), sign=sign, blocks=x.codes.shape[-1])
        return Term(x.codes if coefficient is None else x.codes * coefficient, sign=sign, region=region)

    def store(
        self,
        site: str,
        terms: Sequence[Term],
        *,
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Operand:
        real = self._sum(terms, shape)
        return Operand(site, real if mask is None else real * mask, compact=compact)

    def fused(self, kernel: str, *arguments: Any) -> Any:
        return None

    def read(self, terms: Sequence[Term]) -> Tensor:
        return self._sum(terms, None)

    @staticmethod
    def _sum(terms: Sequence[Term], shape: Sequence[int] | None) -> Tensor:
        """Like scaled_sum, in the dtype of the terms (float64 stays float64)."""
        if any(t.region is not None or t.blocks is not None for t in terms):
            assert shape is not None
            total = terms[0].acc.new_zeros(*shape)
            for t in terms:
                part = place(total, t)
                part.add_(t.acc) if t.sign > 0 else part.sub_(t.acc)
            return total
        total = terms[0].acc if terms[0].sign > 0 else -terms[0].acc
        for t in terms[1:]:
            total = total + t.acc if t.sign > 0 else total - t.acc
        return total


Observe = Callable[[str, Tensor, bool], None]


class SiteArithmetic(FloatArithmetic):
    """Float, with `enter` between every site and what reads it."""

    def enter(self, site: str, x: Tensor, compact: bool) -> Tensor:
        """What becomes of a tensor that enters a site."""
        raise NotImplementedError

    def quantize(self, site: str, x: Tensor) -> Operand:
        return self._entered(super().quantize(site, x))

    def store(self, site: str, terms: Sequence[Term], **options: Any) -> Operand:
        return self._entered(super().store(site, terms, **options))

    def _entered(self, x: Operand) -> Operand:
        return replace(x, codes=self.enter(x.site, x.codes, x.compact))


class ObservingArithmetic(SiteArithmetic):
    """Float, with `observe(site, x, compact)` called on everything that enters a site, as the scheme will meet it."""

    def __init__(self, observe: Observe, decay: Decay = "exp", rotate: frozenset[str] = frozenset()) -> None:
        self.observe = observe
        self.decay: Decay = decay
        self.rotate = rotate

    def enter(self, site: str, x: Tensor, compact: bool) -> Tensor:
        self.observe(site, x, compact)
        return x
