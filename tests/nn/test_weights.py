"""Codes of weights: to nearest, least square error, GPTQ; Brevitas says what they should be."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from qdeltanet.core import IntFormat, QDeltaNetError
from qdeltanet.nn import gptq_weight, quantize_weight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from brevitas.graph.gptq import gptq_mode
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE

FORMATS = [IntFormat(bits) for bits in (2, 3, 4, 8, 12)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brevitas_linear(weight: Tensor, fmt: IntFormat, quantizer: type) -> QuantLinear:
    layer = QuantLinear(*weight.T.shape, bias=False, weight_quant=quantizer, weight_bit_width=fmt.bits)
    layer.weight.data = weight.clone()
    return layer.eval()


def values(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] of codes with a scale per output channel or group."""
    groups = scale.view(len(codes), -1)
    return (codes.float().view(*groups.shape, -1) * groups[..., None]).view(codes.shape)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@torch.no_grad()
def test_codes_are_those_of_brevitas(fmt):
    weight = torch.cat([normal(24, 64), normal(8, 64) * 1e-4, torch.zeros(1, 64)])
    for method, quantizer in (("rtn", Int8WeightPerChannelFloat), ("mse", Int8WeightPerChannelFloatMSE)):
        codes, scale = quantize_weight(weight, fmt, method=method)
        expected = brevitas_linear(weight, fmt, quantizer).quant_weight()
        assert torch.equal(values(codes, scale), expected.value)
        assert codes.dtype == (torch.int8 if fmt.bits <= 8 else torch.int16)
        assert int(codes.abs().amax()) == fmt.qmax


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_to_nearest_and_the_clip_of_least_error(fmt):
    weight = torch.distributions.StudentT(3.0).sample((64, 48)) if fmt.bits % 2 else normal(64, 48)
    rtn, mse = (quantize_weight(weight, fmt, method=m) for m in ("rtn", "mse"))
    assert bool(((weight - values(*rtn)).abs() <= 0.5001 * rtn[1][:, None]).all())
    error = {m: (weight - values(*x)).square().sum(1) for m, x in (("rtn", rtn), ("mse", mse))}
    assert bool((error["mse"] <= error["rtn"] * (1 + 1e-6)).all())
    fine = torch.stack([_clipped(weight, fmt, ratio) for ratio in torch.linspace(0.05, 1, 191)]).amin(0)
    assert float(error["mse"].sum()) < 1.05 * float(fine.sum())  # 20 clips tried, against 191
    if fmt.bits <= 4:
        assert float(error["mse"].sum()) < 0.97 * float(error["rtn"].sum())


def _clipped(weight: Tensor, fmt: IntFormat, ratio: Tensor) -> Tensor:
    scale = ratio * weight.abs().amax(1, keepdim=True) / fmt.qmax
    return (weight - (weight / scale).round().clamp(-fmt.qmax, fmt.qmax) * scale).square().sum(1)


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_a_group_is_quantized_as_if_it_were_alone(method):
    weight = normal(16, 96)
    codes, scale = quantize_weight(weight, IntFormat(4), 32, method)
    assert scale.shape == (16, 3)
    for g in range(3):
        alone = quantize_weight(weight[:, 32 * g : 32 * (g + 1)], IntFormat(4), method=method)
        assert torch.equal(codes[:, 32 * g : 32 * (g + 1)], alone[0])
        assert torch.equal(scale[:, g], alone[1])


def test_the_largest_int16_weight_is_not_clipped():
    weight = normal(8, 64)
    codes, scale = quantize_weight(weight, IntFormat(16))
    assert int(codes.abs().amax()) == 32639
    assert bool(((weight - values(codes, scale)).abs() <= 0.51 * scale[:, None]).all())


# -- GPTQ --------------------------------------------------------------------------------------------------------------

MIX = normal(64, 64, seed=1) * torch.logspace(0, -1.5, 64)  # inputs with strong directions, as activations have
SEEN, UNSEEN = normal(2000, 64, seed=2) @ MIX, normal(2000, 64, seed=3) @ MIX


def hessian(inputs: Tensor) -> Tensor:
    return inputs.double().T @ inputs.double()


def output_error(weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    """Relative square error of the outputs for inputs that GPTQ has not seen."""
    exact = UNSEEN @ weight.T
    return float((UNSEEN @ values(codes, scale).T - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@torch.no_grad()
def test_gptq_is_that_of_brevitas_over_the_same_inputs(bits):
    """Brevitas drives a model by itself; per output channel its codes have to be ours."""
    fmt, weight = IntFormat(bits), normal(48, 64)
    model = torch.nn.Sequential(brevitas_linear(weight, fmt, Int8WeightPerChannelFloatMSE))
    model(SEEN[:1])
    with warnings.catch_warnings(), gptq_mode(model, use_quant_activations=False, num_blocks=1) as gptq:
        warnings.simplefilter("ignore")
        gptq.model(SEEN)
        gptq.update()
    codes, scale = gptq_weight(weight, hessian(SEEN), fmt)
    assert torch.equal(values(codes, scale), model[0].quant_weight().value)


@pytest.mark.parametrize("group", [None, 64, 32, 16, 2])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_is_real(bits, group):
    fmt, weight = IntFormat(bits), normal(48, 64)
    found = gptq_weight(weight, hessian(SEEN), fmt, group)
    rtn, mse = (quantize_weight(weight, fmt, group, method) for method in ("rtn", "mse"))
    assert found[0].shape == rtn[0].shape
    assert found[1].shape == rtn[1].shape
    assert int(found[0].abs().amax()) <= fmt.qmax
    assert float((found[0] != rtn[0]).float().mean()) > 0.2
    assert output_error(weight, *found) < 0.5 * min(output_error(weight, *x) for x in (rtn, mse))


def test_blocks_of_columns_do_not_matter():
    """300 columns are three blocks of 128; each group begins with weights that know of all errors before it."""
    inputs, weight = normal(3000, 300, seed=4), normal(8, 300)
    inputs = inputs + inputs[:, :1]
    for group in (None, 100, 30):
        codes, scale = gptq_weight(weight, hessian(inputs), IntFormat(4), group)
        expected = _column_by_column(weight, hessian(inputs), IntFormat(4), group or 300)
        assert float((values(codes, scale) != expected).float().mean()) < 1e-3  # ties, by the order of float sums


def _column_by_column(weight: Tensor, h: Tensor, fmt: IntFormat, group: int) -> Tensor:
    """GPTQ's definition: round a column, solve for the columns that are left, forget it."""
    current, result = weight.double().clone(), torch.zeros_like(weight)
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h)))
    for i in range(weight.shape[1]):
        if i % group == 0:
            scale = quantize_weight(current[:, i : i + group], fmt, method="mse")[1]
        value = (current[:, i] / scale.double()).round().clamp(-fmt.qmax, fmt.qmax) * scale.double()
        result[:, i] = value.float()
        error = (current[:, i] - value) / inverse[i, i]
        current[:, i:] -= error[:, None] * inverse[i, i:]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i, i] = 1.0  # of a row and column that are gone
    return result


def test_inputs_that_never_came_keep_their_weights():
    inputs, weight = SEEN.clone(), normal(8, 64)
    inputs[:, [3, 40]] = 0
    codes, scale = gptq_weight(weight, hessian(inputs), IntFormat(8))
    error = (weight - values(codes, scale)).abs()
    assert bool((error[:, [3, 40]] <= 0.51 * scale[:, None]).all())
    nothing = gptq_weight(weight, torch.zeros(64, 64, dtype=torch.float64), IntFormat(8))
    assert torch.equal(nothing[0], quantize_weight(weight, IntFormat(8), method="mse")[0])


def test_fewer_tokens_than_channels_and_what_cannot_be_inverted():
    weight = normal(8, 64)
    codes, scale = gptq_weight(weight, hessian(SEEN[:5]), IntFormat(4))
    assert bool(torch.isfinite(values(codes, scale)).all())
    with pytest.raises(QDeltaNetError, match="cannot be inverted; calibrate on more samples"):
        gptq_weight(weight, -hessian(SEEN), IntFormat(4))
