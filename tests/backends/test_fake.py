"""Fake quantization: the integers' forward to the bit, with gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import INTEGER_KINDS, KINDS, Recording, bound_rule, differing, float_rule, rule_inputs, run
from torch import Tensor

from qdeltanet.inverse import plan

NAMES = ("query", "key", "value", "g", "beta")
P = plan("block_merge", 16)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    make = torch.Generator().manual_seed(3)
    seed = torch.randn(output.shape, generator=make)
    return list(torch.autograd.grad((output * seed).sum(), inputs))


def with_grad(seed: int = 0) -> list[Tensor]:
    inputs = rule_inputs(2, 48, 1, 2, 16, 8, seed=seed)
    return [x.clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(name, bits) for name in KINDS for bits in (4, 8, 16)]
    + [(name, bits) for name in INTEGER_KINDS for bits in (4, 8)],
)
def test_gradients_flow_to_every_input_and_the_forward_stays_integer(kind: str, bits: int) -> None:
    k = (KINDS | INTEGER_KINDS)[kind]
    inputs = with_grad()
    plain = tuple(x.detach() for x in inputs)
    scheme, scales = bound_rule(plain, P, bits, k)  # type: ignore[arg-type]
    integer = Recording(scheme, scales, "reference")
    expected, _ = run(plain, P, integer)  # type: ignore[arg-type]
    fake = Recording(scheme, scales, "fake", allow_float=True)
    output, _ = run(tuple(inputs), P, fake)  # type: ignore[arg-type]
    assert torch.equal(output.detach(), expected)
    assert differing(integer, fake) == {}
    for name, grad in zip(NAMES, gradients(output, inputs), strict=True):
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize(("bits", "least"), [(8, 0.97), (16, 0.999)])
@pytest.mark.parametrize("kind", ["per_head", "finest dynamic"])
def test_gradients_point_where_those_of_float_do(kind: str, bits: int, least: float) -> None:
    inputs = with_grad()
    plain = tuple(x.detach() for x in inputs)
    scheme, scales = bound_rule(plain, P, bits, KINDS[kind])  # type: ignore[arg-type]
    output, _ = run(tuple(inputs), P, Recording(scheme, scales, "fake"))  # type: ignore[arg-type]
    of_float = gradients(float_rule(tuple(inputs), 16), inputs)  # type: ignore[arg-type]
    for name, a, b in zip(NAMES, gradients(output, inputs), of_float, strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert float(cosine) > least, name


def test_hard_decay_has_finite_gradients() -> None:
    inputs = with_grad()
    with torch.no_grad():
        inputs[3].fill_(-166.0)
        inputs[3][..., 1] = -1e-4
    plain = tuple(x.detach() for x in inputs)
    scheme, scales = bound_rule(plain, P, 8, KINDS["per_head"])  # type: ignore[arg-type]
    output, _ = run(tuple(inputs), P, Recording(scheme, scales, "fake"))  # type: ignore[arg-type]
    for name, grad in zip(NAMES, gradients(output, inputs), strict=True):
        assert grad.isfinite().all(), name
