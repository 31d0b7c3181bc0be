from __future__ import annotations

import pytest
import torch

from qdeltanet.backends import get_backend
from qdeltanet.core import (
    BindingError,
    FloatArithmetic,
    Granularity,
    IntegerArithmetic,
    IntFormat,
    NonFiniteError,
    ObservingArithmetic,
    Operand,
    RuleScheme,
    SiteScheme,
)

INT8, INT4, INT16 = IntFormat(8), IntFormat(4), IntFormat(16)
ONE = torch.ones(1, 1, 1)


def arithmetic(**sites: SiteScheme) -> IntegerArithmetic:
    scales = dict.fromkeys(sites, ONE / 100) | {f"{site}/{side}": ONE / 7 for site in sites for side in ("left",)}
    return IntegerArithmetic(RuleScheme(sites), scales, get_backend("reference"))


def test_product_store_and_read_are_the_written_formula() -> None:
    ar = arithmetic(x=SiteScheme(INT8), y=SiteScheme(INT8), z=SiteScheme(INT8))
    make = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 4, generator=make) - 0.5, torch.rand(2, 4, 5, generator=make) - 0.5
    a, b = ar.quantize("x", x), ar.quantize("y", y)
    acc = a.codes.long() @ b.codes.long()
    scale = torch.tensor(0.01)
    unit = (scale.double() * scale.double()).float()
    term = ar.product(a, b, sign=-1)
    assert torch.equal(ar.read([term]), acc.float() * -unit)
    stored = ar.store("z", [term, ar.addend(Operand("z", torch.ones(2, 3, 5), ONE / 100, INT8))])
    m = (scale.double() * scale.double() / scale.double()).float()
    expected = torch.round(acc.float() * -m + torch.ones(2, 3, 5)).clamp(-127, 127)
    assert torch.equal(stored.codes, expected.long())
    assert stored.format == INT8


def test_coefficients_multiply_the_accumulator_as_codes() -> None:
    ar = arithmetic(x=SiteScheme(INT8))
    codes = torch.tensor([[[100.0, -3.0], [7.0, 127.0]]])
    coefficient = torch.tensor([[[0.3, 1.0], [0.0, 2.0]]])
    x = Operand("x", codes, ONE / 100, INT8)
    term = ar.product(x, Operand("x", torch.eye(2)[None], ONE, INT8), coefficient=coefficient)
    assert torch.equal(term.int64(), codes.long() * torch.tensor([[[9830, 32768], [0, 65536]]]))
    assert term.bound == 2 * 127 * 127 * 2 * 2**15
    assert torch.allclose(ar.read([term]), codes / 100 * coefficient, atol=2e-5)


def test_a_carried_site_is_requantized_at_each_use() -> None:
    ar = arithmetic(s=SiteScheme(INT4, "calibrated", Granularity.FINEST, INT16), x=SiteScheme(INT8))
    s = Operand("s", torch.tensor([[[100.0, 51.0], [-7.0, 22.0]]]), ONE / 100, INT16)
    term = ar.product(s, Operand("x", torch.eye(2)[None], ONE, INT8))
    assert term.acc.tolist() == [[[7, 4], [0, 2]]]  # 7 = round(1.00 * 7), 4 = round(3.57), 0 = round(-0.49)
    assert [float(x) for x in term.scales] == pytest.approx([1 / 7, 1.0])


def test_saturation_is_counted_per_site() -> None:
    ar = arithmetic(x=SiteScheme(INT8), z=SiteScheme(INT4))
    x = ar.quantize("x", torch.tensor([[[1.0, 5.0, -5.0, 1.27]]]))
    assert x.codes.tolist() == [[[100, 127, -127, 127]]]
    assert ar.saturated == {"x": 2}
    ar.quantize("x", torch.tensor([[[2.0]]]))
    ar.store("z", [ar.addend(x)])
    assert ar.saturated == {"x": 3, "z": 4}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_refused_by_site(bad: float) -> None:
    ar = arithmetic(v_beta=SiteScheme(INT8))
    with pytest.raises(NonFiniteError, match=r"site v_beta: NaN or Inf") as caught:
        ar.quantize("v_beta", torch.tensor([[[0.0, bad]]]))
    assert caught.value.site == "v_beta"


def test_missing_scales_schemes_and_formats_are_named() -> None:
    ar = IntegerArithmetic(RuleScheme({"x": SiteScheme(INT8)}), {}, get_backend("reference"))
    with pytest.raises(BindingError, match="no calibrated scale for site x"):
        ar.quantize("x", torch.ones(1, 2, 2))
    with pytest.raises(BindingError, match="site y has no scheme"):
        ar.quantize("y", torch.ones(1, 2, 2))
    floats = RuleScheme({"x": SiteScheme(None)})
    with pytest.raises(BindingError, match=r"site x has format float.*execute as fake"):
        IntegerArithmetic(floats, {}, get_backend("reference"))
    fake = IntegerArithmetic(floats, {}, get_backend("fake"), allow_float=True)
    x = torch.rand(1, 2, 2)
    assert torch.equal(fake.quantize("x", x).real(), x)


def test_products_that_could_overflow_are_refused_at_the_latest_when_they_run() -> None:
    scheme = RuleScheme({"x": SiteScheme(INT16, "dynamic")}, accumulator_bits=32)
    ar = IntegerArithmetic(scheme, {}, get_backend("reference"))
    x = ar.quantize("x", torch.rand(1, 8, 8))
    ar.product(x, x)
    x = ar.quantize("x", torch.zeros(1, 1, 2**17))
    with pytest.raises(BindingError, match=r"step x @ x: .*32-bit accumulation"):
        ar.product(x, x.mT)


def test_float_arithmetic_keeps_the_dtype_and_observers_see_every_site() -> None:
    seen: list[tuple[str, bool]] = []
    ar = ObservingArithmetic(lambda site, x, compact: seen.append((site, compact)))
    x = ar.quantize("x", torch.rand(2, 3, 3, dtype=torch.float64))
    z = ar.store("z", [ar.product(x, x), ar.addend(x, sign=-1)], mask=torch.ones(3, 3).tril(), compact=True)
    assert z.codes.dtype is torch.float64
    assert torch.allclose(z.codes, (x.codes @ x.codes - x.codes).tril(), atol=1e-15)
    assert seen == [("x", False), ("z", True)]
    part = (slice(0, 2), slice(0, 3)), (slice(0, 3), slice(1, 3))
    term = FloatArithmetic().product(x, x, parts=part, region=(slice(0, 2), slice(1, 3)))
    regional = FloatArithmetic().store("z", [term, ar.addend(x)], shape=(2, 3, 3))
    expected = x.codes.clone()
    expected[:, :2, 1:] += (x.codes @ x.codes)[:, :2, 1:]
    assert torch.allclose(regional.codes, expected, atol=1e-15)
