"""The arithmetic whose numbers are tensors of an ONNX graph: the rule's own code, run over it, writes the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ...core import (
    Decay,
    IntFormat,
    Operand,
    Region,
    RuleScheme,
    Side,
    Term,
    coefficient_bits,
    fit_scale,
    product_bound,
    use_key,
)
from ...core.arithmetic import SiteArithmetic
from .inverse import run_whole
from .sites import Quantizer, Sites
from .symbol import Symbol


class OnnxArithmetic(SiteArithmetic):
    """Real numbers with a quantizer at every site, as `IntegerArithmetic` has them: what that does in codes and
    requantizations, this does in products of dequantized codes.

    scheme: bound. scales: by key. prefix: of the names of all tensors, `layers.<index>.`. A site that is written more
    than once (the state, v_new: once per chunk) is numbered from its second time on: `v_new`, `v_new.1`.
    """

    def __init__(self, scheme: RuleScheme, scales: Mapping[str, Tensor], prefix: str, sites: Sites) -> None:
        self.scheme, self.scales, self.prefix, self.sites = scheme, scales, prefix, sites
        self.decay: Decay = scheme.decay
        self.rotate = scheme.rotate
        self._times: Counter[str] = Counter()
        self._uses: dict[tuple[int, Side], Operand] = {}

    def fused(self, kernel: str, *arguments: Any) -> Any:
        return run_whole(*arguments, arithmetic=self) if kernel == "run_plan" else None

    def enter(self, site: str, x: Tensor, compact: bool) -> Tensor:
        held = self.scheme.sites[site].held
        return x if held is None else self._quantized(site, x, held, site)

    def _entered(self, x: Operand) -> Operand:
        """With error feedback, what the codes leave out has a quantizer of its own."""
        entered, feedback = super()._entered(x), self.scheme.sites[x.site].feedback
        if feedback is None:
            return entered
        finer = self.scales[x.site] * 2.0**-feedback.bits
        left = self._quantized(x.site, x.codes - entered.codes, feedback, f"{x.site}.residual", finer)
        return replace(entered, residual=Operand(x.site, left))

    def product(self, left: Operand, right: Operand, *, coefficient: Tensor | None = None, **options: Any) -> Term:
        formats = [self.scheme.sites[x.site].format for x in (left, right)]
        if coefficient is not None and all(formats):
            a, b = cast("list[IntFormat]", formats)
            bound = product_bound(left.contracted, a, b)
            coefficient = self._coefficient(coefficient, f"{left.site}_{right.site}", bound, max(a.bits, b.bits))
        return super().product(self._use(left, "left"), self._use(right, "right"), coefficient=coefficient, **options)

    def addend(
        self,
        x: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        size: int | None = None,
    ) -> Term:
        scheme = self.scheme.sites.get(x.site)
        if coefficient is not None and scheme is not None and scheme.held is not None:
            bits = scheme.held.bits + (0 if scheme.feedback is None else scheme.feedback.bits)
            coefficient = self._coefficient(coefficient, x.site, scheme.held.qmax, bits)
        return super().addend(x, coefficient=coefficient, sign=sign, region=region, size=size)

    def _use(self, x: Operand, side: Side) -> Operand:
        """A carried tensor as an operand: quantized once more, for each side of a product."""
        scheme = self.scheme.sites[x.site]
        if scheme.carry is None or scheme.format is None:
            return x
        key = (id(cast(Any, x.codes).value), side)
        if key not in self._uses:
            name = use_key(x.site, side)
            self._uses[key] = replace(x, codes=self._quantized(name, x.codes, scheme.format, name))
        return self._uses[key]

    def _quantized(self, key: str, x: Tensor, fmt: IntFormat, name: str, scale: Tensor | None = None) -> Tensor:
        fitted = fit_scale((self.scales[key] if scale is None else scale).detach().cpu(), x.shape)
        quantizer = Quantizer(self._name(name), self.prefix + name, fmt, fitted)
        return cast(Tensor, self.sites.site(cast(Symbol, x), quantizer))

    def _coefficient(self, x: Tensor, name: str, bound: int, bits: int) -> Tensor:
        fraction = coefficient_bits(bound, bits)
        return cast(Tensor, self.sites.coefficient(cast(Symbol, x), self._name(f"{name}.coefficient"), fraction))

    def _name(self, name: str) -> str:
        """Names of tensors are unique in a graph."""
        n = self._times[name]
        self._times[name] += 1
        return f"{self.prefix}{name}" + (f".{n}" if n else "")
