"""The integer arithmetic: codes on a backend. Fake quantization is the same on `FloatContainers`, with gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .accumulate import COEFFICIENT_MAX, check_product, coefficient_bits, product_bound
from .backend import Backend
from .errors import BindingError, NonFiniteError, QDeltaNetError
from .feedback import entered_residual, stored_residual
from .granularity import Granularity, dynamic_scale, fit_scale
from .operand import Operand, block_part, diagonal_blocks, repeat_heads, sub_blocks
from .quantize import check_scale, coefficient_codes, round_half_even, saturate
from .requantize import Target
from .scheme import Decay, RuleScheme, Side, SiteScheme, use_granularity, use_key
from .terms import Region, Term, scaled_sum


class IntegerArithmetic:
    """Codes on a backend, bound to a scheme and its scales.

    scales: float32 [H or 1, R or 1, C or 1] per site, and per `site/left`, `site/right` for the operand codes of a
    carried site. saturated counts clipped elements per site. Integer execution refuses sites without a format
    (`allow_float=False`); fake execution carries real numbers through them.

    Raises BindingError where a bound fails or a scale is missing, NonFiniteError where NaN or Inf enters a site.
    """

    def __init__(
        self, scheme: RuleScheme, scales: Mapping[str, Tensor], backend: Backend, *, allow_float: bool = False
    ) -> None:
        if not allow_float:
            for site, s in scheme.sites.items():
                if s.format is None:
                    raise BindingError(f"site {site} has format float: give it an integer format, or execute as fake")
        if scheme.requantize == "power_of_two":
            for key, scale in scales.items():
                if not bool((torch.frexp(scale).mantissa == 0.5).all()):
                    raise BindingError(f"site {key}: requantize: power_of_two needs scales that are powers of two")
        for key, scale in scales.items():
            if scale.device.type == "cpu":
                check_scale(scale, key)
        self.scheme = scheme
        self.scales = scales
        self.backend = backend
        self._saturated: dict[str, int | Tensor] = {}

    @property
    def decay(self) -> Decay:
        return self.scheme.decay

    @property
    def rotate(self) -> frozenset[str]:
        return self.scheme.rotate

    # -- the five verbs ------------------------------------------------------------------------------------------

    def quantize(self, site: str, x: Tensor) -> Operand:
        scheme = self.site(site)
        held = scheme.held
        if held is None:
            _check_finite(site, x)
            return Operand(site, x)
        x = x.to(torch.float32)
        out = self.out_scale(site, scheme, x.shape)
        if isinstance(out, Granularity):
            scale = dynamic_scale(x, held.qmax, out)
            _check_finite(site, scale)
            codes = round_half_even(x / scale, new=True)
        else:
            scale = out
            if scale.device != x.device:
                raise QDeltaNetError(f"site {site}: its scale is on {scale.device}, the tensor on {x.device}; move one")
            codes, saturated = saturate(round_half_even(x / scale, new=True), held)
            if not isinstance(saturated, int):  # NaN and Inf lie outside of every format
                _check_finite(site, x)
            self.count(site, saturated)
        return entered_residual(Operand(site, codes, scale, held), x, scheme.feedback)

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
        contracted = left.contracted
        left = self.use(left, "left", None if parts is None else parts[0], size)
        right = self.use(right, "right", None if parts is None else parts[1], size)
        if left.format is None or right.format is None:
            acc, scales, bound = left.real() @ right.real(), [], 0
        else:
            assert left.scale is not None
            assert right.scale is not None
            # of the whole axis, whatever of it is skipped: fixed point depends on the bound, and must not on skipping
            bound = product_bound(contracted, left.format, right.format)
            step = f"{left.site} @ {right.site}"
            check_product(step, contracted, left.format, right.format, self.scheme.accumulator_bits)
            acc = self.backend.matmul(left.codes, right.codes, left.format.qmax, right.format.qmax)
            scales = [left.scale, right.scale]
        return self._scaled(acc, scales, bound, max(_bits(left), _bits(right)), coefficient, sign, region, fresh=True)

    def addend(
        self,
        x: Operand,
        *,
        coefficient: Tensor | None = None,
        sign: int = 1,
        region: Region | None = None,
        size: int | None = None,
    ) -> Term:
        scales = [] if x.scale is None else [x.scale]
        bound = 0 if x.format is None else x.format.qmax
        if size is not None:
            split = tuple(sub_blocks(s, size, x.codes.shape[-1]) for s in scales)
            return Term(sub_blocks(x.codes, size), split, sign, bound, blocks=x.codes.shape[-1])
        return self._scaled(x.codes, scales, bound, self._resolution(x), coefficient, sign, region)

    def store(
        self,
        site: str,
        terms: Sequence[Term],
        *,
        shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        compact: bool = False,
    ) -> Operand:
        scheme = self.site(site)
        if scheme.held is None:
            real = scaled_sum(terms, None, shape)
            return Operand(site, real if mask is None else real * mask, compact=compact)
        size = tuple(shape) if shape is not None else terms[0].acc.shape
        scale = self.out_scale(site, scheme, size, compact)
        where = None if shape is None else tuple(shape)
        target = Target(scheme.held, scale, self.scheme.requantize, where, mask, compact)
        if scheme.feedback is not None:
            terms = [replace(t, fresh=False) for t in terms]  # they are read once more
        result = self.backend.requantize(terms, target)
        if scheme.scale == "dynamic" and not bool(result.scale.isfinite().all()):
            raise NonFiniteError(site)  # the sum left float32: a method that diverges, or inputs that do
        self.count(site, result.saturated)
        stored = Operand(site, result.codes, result.scale, scheme.held, compact)
        return stored_residual(stored, terms, target, scheme.feedback, self.backend)

    def fused(self, kernel: str, *arguments: Any) -> Any:
        run = self.backend.kernels.get(kernel)
        return None if run is None else run(self, *arguments)

    def read(self, terms: Sequence[Term]) -> Tensor:
        return scaled_sum(terms)

    # -- what was clipped ----------------------------------------------------------------------------------------

    @property
    def saturated(self) -> Counter[str]:
        """Clipped elements per site since the arithmetic was made."""
        return Counter({site: int(n) for site, n in self._saturated.items() if int(n)})

    def count(self, site: str, n: int | Tensor) -> None:
        self._saturated[site] = self._saturated.get(site, 0) + n

    # -- helpers -------------------------------------------------------------------------------------------------

    def site(self, site: str) -> SiteScheme:
        if site not in self.scheme.sites:
            raise BindingError(f"site {site} has no scheme in this recipe")
        return self.scheme.sites[site]

    def _scale(self, key: str, shape: Sequence[int], compact: bool = False) -> Tensor:
        if key not in self.scales:
            raise BindingError(f"no calibrated scale for site {key}: calibrate with this recipe first")
        return fit_scale(self.scales[key], shape, compact)

    def out_scale(
        self, site: str, scheme: SiteScheme, shape: Sequence[int], compact: bool = False
    ) -> Tensor | Granularity:
        if scheme.scale == "dynamic":
            return scheme.held_granularity
        return self._scale(site, shape, compact)

    def use(self, x: Operand, side: Side, part: Region | None, size: int = 0) -> Operand:
        """Operand codes for one side of a product: a carried tensor is requantized, any other taken as it is.

        A dynamic scale is that of the part which takes part; a static one belongs to the whole tensor.
        """
        scheme = self.site(x.site)
        x = x.parts[0]
        carried = scheme.carry is not None and x.format is not None and scheme.format is not None
        if part is not None and not (carried and scheme.scale != "dynamic"):
            x, part = block_part(x, size, *part), None
        elif part is not None:
            x = diagonal_blocks(x, size)
        if not carried:
            return x
        assert x.format is not None
        assert scheme.format is not None
        out: Tensor | Granularity = use_granularity(scheme, side)
        if scheme.scale != "dynamic":
            out = self._scale(use_key(x.site, side), x.codes.shape, x.compact)
        term = Term(x.codes, () if x.scale is None else (x.scale,), bound=x.format.qmax)
        target = Target(scheme.format, out, self.scheme.requantize, compact=x.compact)
        result = self.backend.requantize([term], target)
        self.count(x.site, result.saturated)
        used = replace(x, codes=result.codes, scale=result.scale, format=scheme.format)
        return used if part is None else used.part(*part)

    def _resolution(self, x: Operand) -> int:
        """Bits that an addend's coefficient has to resolve: with feedback those of codes and residual together."""
        scheme = self.scheme.sites.get(x.site)  # the constant I of a plan is no site
        return _bits(x) + (0 if scheme is None or scheme.feedback is None else scheme.feedback.bits)

    def _scaled(
        self,
        acc: Tensor,
        scales: list[Tensor],
        bound: int,
        bits: int,
        coefficient: Tensor | None,
        sign: int,
        region: Region | None,
        fresh: bool = False,
    ) -> Term:
        if coefficient is None:
            return Term(acc, tuple(scales), sign, bound, region, fresh=fresh)
        _check_coefficient(coefficient)
        if not scales:  # real numbers
            return Term(repeat_heads(acc, coefficient.shape[-3]) * coefficient, (), sign, 0, region)
        fraction = coefficient_bits(bound, bits)
        wide = bound * COEFFICIENT_MAX * 2**fraction
        unit = torch.full((1, 1, 1), 2.0**-fraction, device=acc.device)
        codes = coefficient_codes(coefficient, fraction)
        scales = [repeat_heads(s, coefficient.shape[-3]) for s in scales]
        return Term(acc, (*scales, unit), sign, wide, region, codes)


def _check_finite(site: str, x: Tensor) -> None:
    if x.numel() and not bool(x.detach().abs().amax().isfinite()):
        raise NonFiniteError(site)


def _check_coefficient(x: Tensor) -> None:
    """The bound of a wide accumulator holds for coefficients up to 2: g <= 0 and beta <= 2."""
    top = float(x.detach().abs().amax()) if x.numel() else 0.0
    if top != top:
        raise NonFiniteError("decay (g, beta)")
    if top > COEFFICIENT_MAX:
        raise QDeltaNetError(f"a decay or beta reaches {top:.3g}; g must be <= 0 and beta <= {COEFFICIENT_MAX}")


def _bits(x: Operand) -> int:
    return 0 if x.format is None else x.format.bits
