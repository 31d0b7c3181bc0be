"""QuantLinear against the int64 definition: groups, static and dynamic activations, integer weights alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qdeltanet.core import BindingError, Granularity, IntFormat, NonFiniteError, ProjectionScheme, SiteScheme
from qdeltanet.nn import QuantLinear, quantize_weight

INPUTS, OUTPUTS = 48, 20


def scheme(
    weight: int = 8, activation: int | None = 8, group: int | None = None, static: bool = False
) -> ProjectionScheme:
    fmt = None if activation is None else IntFormat(activation)
    site = (
        SiteScheme(fmt, "calibrated", Granularity.PER_TENSOR) if static else
        SiteScheme(fmt, "dynamic", Granularity.PER_TOKEN)
    )  # fmt: skip
    return ProjectionScheme(IntFormat(weight), site, group)


def projection(chosen: ProjectionScheme, bias: bool = False, seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    result = QuantLinear(INPUTS, OUTPUTS, chosen, linear)
    result.codes, result.scale = quantize_weight(linear.weight, chosen.weight, chosen.group)
    if result.is_static:
        result.input_scale = torch.tensor([0.02])
    return result


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(seed))


def defined(layer: QuantLinear, x: Tensor) -> Tensor:
    """The docstring's formula, group by group in int64, every float32 operation by itself."""
    fmt = layer.scheme.activation.format
    assert fmt is not None
    scale = layer.input_scale if layer.is_static else (x.abs().amax(-1, keepdim=True) / torch.tensor(float(fmt.qmax)))
    codes = torch.round(x / scale).clamp(-fmt.qmax, fmt.qmax).long()
    steps = layer.scale.view(OUTPUTS, -1)
    y = None
    for g, part in enumerate(torch.arange(INPUTS).split(INPUTS // steps.shape[1])):
        acc = codes[..., part] @ layer.codes.long().T[part]
        term = acc.float() * scale
        term = term * steps[:, g]
        y = term if y is None else y + term
    return y if layer.bias is None else y + layer.bias


@given(
    weight=st.sampled_from([2, 3, 4, 8, 12, 16]),
    activation=st.sampled_from([2, 4, 8, 16]),
    group=st.sampled_from([None, 48, 16, 3, 1]),
    static=st.booleans(),
    bias=st.booleans(),
)
@torch.no_grad()
def test_every_backend_gives_the_bits_of_the_definition(weight, activation, group, static, bias):
    layer, x = projection(scheme(weight, activation, group, static), bias), inputs(2, 5)
    expected = defined(layer, x)
    for execution, backend in (("integer", "reference"), ("integer", "cpu"), ("fake", "auto")):
        layer.set_execution(execution, backend)
        assert torch.equal(layer(x), expected)


def test_groups_follow_weights_of_other_sizes():
    """Channels of a group that is a thousand times smaller survive beside the others only with a scale of their own."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data[:, :16] *= 1e-3
    x = inputs(4)
    x[:, 16:] = 0
    with torch.no_grad():
        exact = linear(x)
        error = []
        for group in (None, 16):
            layer = QuantLinear(INPUTS, OUTPUTS, scheme(4, 8, group), linear)
            layer.codes, layer.scale = quantize_weight(linear.weight, IntFormat(4), group)
            layer.set_execution("integer")
            error.append(float((layer(x) - exact).norm() / exact.norm()))
    assert error[0] > 0.9
    assert error[1] < 0.15


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_integer_weights_alone(group, dtype):
    layer, x = projection(scheme(4, None, group), bias=True).to(dtype), inputs(2, 5).to(dtype)
    weight = layer.codes.float() * layer.scale.view(OUTPUTS, -1).repeat_interleave(group or INPUTS, dim=1)
    expected = torch.nn.functional.linear(x, weight.to(dtype), layer.bias)
    for execution in ("integer", "fake"):
        layer.set_execution(execution)
        assert torch.equal(layer(x), expected)
        assert layer(x).dtype == dtype
    assert layer.saturated == 0
    assert not layer.is_static


@torch.no_grad()
def test_a_batch_of_tokens_does_not_change_one_and_none_is_fine():
    layer, x = projection(scheme(4, 8, 16)), inputs(2, 5)
    layer.set_execution("integer")
    assert torch.equal(layer(x)[1, 3], layer(x[1, 3]))
    assert layer(x[:0]).shape == (0, 5, OUTPUTS)


@torch.no_grad()
def test_clipped_activations_are_counted():
    layer, x = projection(scheme(4, 8, 16, static=True)), inputs(7)
    layer.set_execution("integer")
    layer(x)
    assert layer.saturated == int((torch.round(x / layer.input_scale).abs() > 127).sum()) > 0
    layer.set_execution("integer")
    assert layer.saturated == 0


def test_a_gradient_passes_through_fake_execution():
    layer, x = projection(scheme(4, 8, 16)), inputs(3).requires_grad_()
    layer.set_execution("fake")
    layer(x).sum().backward()
    expected = layer.dequantized().sum(0).expand_as(x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)  # the same sums in another order


def test_buffers_and_a_bias_are_what_a_checkpoint_needs():
    layer = projection(scheme(4, 8, 16, static=True), bias=True)
    state = {k: (v.dtype, tuple(v.shape)) for k, v in layer.state_dict().items() if ".original." not in f".{k}"}
    assert state == {
        "codes": (torch.int8, (OUTPUTS, INPUTS)),
        "scale": (torch.float32, (OUTPUTS, 3)),
        "input_scale": (torch.float32, (1,)),
        "bias": (torch.float32, (OUTPUTS,)),
    }
    assert projection(scheme()).scale.shape == (OUTPUTS,)


def test_what_cannot_be_bound():
    with pytest.raises(BindingError, match="projection of 48 inputs: groups of 32 do not divide them"):
        QuantLinear(INPUTS, OUTPUTS, scheme(4, 8, 32))
    with pytest.raises(BindingError, match="the accumulator can reach"):
        QuantLinear(2**24, 1, scheme(16, 16))
    QuantLinear(2**12, 1, scheme(16, 16, 2**6))


@torch.no_grad()
def test_float_execution_needs_the_float_weights_and_nan_is_named():
    layer = projection(scheme(4, 8, 16))
    layer.original = None
    with pytest.raises(BindingError, match="integer weights only"):
        layer(inputs(1))
    layer.set_execution("integer")
    with pytest.raises(NonFiniteError, match="projection input"):
        layer(inputs(1) * float("nan"))
