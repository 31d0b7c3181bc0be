"""`qdeltanet bench delta-rule`: the whole chunkwise rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backends import get_backend
from ...conformance.inputs import ALL_KINDS, Inputs, Kind, bound_rule, rule_inputs, run
from ...core import FloatArithmetic, IntegerArithmetic, QDeltaNetError, sqnr
from ...delta_rule import prepare, rule_sites, run_front
from ...inverse import Plan, plan
from .peers import BrevitasArithmetic, fla, transformers_rule
from .timing import Case


@dataclass(frozen=True)
class Size:
    """B sequences of T tokens, key and value heads of D, chunks of C tokens."""

    batch: int = 1
    tokens: int = 2048
    key_heads: int = 16
    value_heads: int = 32
    head_dim: int = 128
    chunk_size: int = 64

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "key_heads", "value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise QDeltaNetError(f"{name.replace('_', ' ')} {getattr(self, name)}: must be at least 1")
        if self.value_heads % self.key_heads:
            raise QDeltaNetError(f"{self.value_heads} value heads are no multiple of {self.key_heads} key heads")

    def __str__(self) -> str:
        heads = f"{self.key_heads} key / {self.value_heads} value heads of {self.head_dim}"
        return f"B={self.batch}, T={self.tokens}, {heads}, C={self.chunk_size}"


def inputs_of(size: Size, device: str) -> Inputs:
    """Random queries, keys and values, slow decay: what a rule is given by its layer."""
    made = rule_inputs(size.batch, size.tokens, size.key_heads, size.value_heads, size.head_dim, size.head_dim)
    return tuple(x.to(device) for x in made)  # type: ignore[return-value]


def delta_rule_cases(size: Size, device: str = "cpu", backend: str = "auto") -> Iterator[Case]:
    """Float, INT8, INT4 and INT16 against transformers' float; INT8 against Brevitas; float against FLA on a GPU."""
    inputs = inputs_of(size, device)
    p = plan("block_merge", size.chunk_size)
    theirs = transformers_rule()

    def peer() -> Any:
        return theirs(*inputs, chunk_size=size.chunk_size, use_qk_l2norm_in_kernel=True)[0]

    def ours() -> Tensor:
        return run(inputs, p, FloatArithmetic())[0]

    name = "transformers float32"
    yield Case("float rule", "float32", ours, name, peer, lambda: _close(ours(), peer()))
    for label, bits, kind in (
        ("INT8 rule, static per head", 8, "per_head"),
        ("INT8 rule, fixed point", 8, "fixed_point"),
        ("INT16 rule, static per head", 16, "per_head"),
        ("INT4 rule, finest, dynamic", 4, "finest dynamic"),
    ):
        arithmetic = integer_arithmetic(inputs, p, bits, ALL_KINDS[kind], device, backend)
        verify, integers = _verifier(inputs, p, arithmetic), _runner(inputs, p, arithmetic)
        case = Case(label, f"int{bits} {arithmetic.backend.name}", integers, name, peer, verify)
        yield case
        if label.startswith("INT8 rule, static"):
            for peer_name, block in (("Brevitas fake INT8", size.tokens), ("the same in our blocks", None)):
                fake = brevitas_rule(inputs, p, block)
                yield replace(case, peer=peer_name, run_peer=fake)
    on_gpu = fla("fla.ops.gated_delta_rule", "chunk_gated_delta_rule") if device.startswith("cuda") else None
    if on_gpu is not None:
        yield _fla_case(on_gpu, inputs, ours)


def _fla_case(theirs: Any, inputs: Inputs, ours: Any) -> Case:
    q, k, v, g, beta = inputs
    # its heads are all value heads, as in transformers' own call
    halves = [x.to(torch.bfloat16) for x in (_as_value_heads(q, v), _as_value_heads(k, v), v)]

    def peer() -> Any:
        return theirs(*halves, g, beta, use_qk_l2norm_in_kernel=True)[0]

    return Case("float rule", "float32", ours, "FLA bfloat16", peer, lambda: _close(peer().float(), ours(), 35))


def _as_value_heads(x: Tensor, v: Tensor) -> Tensor:
    """[B, T, HK, K] -> [B, T, H, K]."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)


def integer_arithmetic(inputs: Inputs, p: Plan, bits: int, kind: Kind, device: str, backend: str) -> IntegerArithmetic:
    """Bound to scales observed on the inputs."""
    on_cpu: Inputs = tuple(x.cpu() for x in inputs)  # type: ignore[assignment]
    scheme, scales = bound_rule(on_cpu, p, bits, kind)
    return IntegerArithmetic(scheme, {k: s.to(device) for k, s in scales.items()}, get_backend(backend, device))


def brevitas_rule(inputs: Inputs, p: Plan, chunk_block: int | None) -> Any:
    """Our float dataflow with Brevitas fake quantization at all sites, statistics frozen.

    chunk_block: chunks handled at once: all, as transformers does, or None for our own blocks.
    """
    fake = BrevitasArithmetic(rule_sites(p))
    fake.observe(lambda: run(inputs, p, fake))
    return lambda: run(inputs, p, fake, chunk_block=chunk_block)[0]


def _runner(inputs: Inputs, p: Plan, arithmetic: IntegerArithmetic) -> Any:
    return lambda: run(inputs, p, arithmetic)[0]


def _verifier(inputs: Inputs, p: Plan, arithmetic: IntegerArithmetic) -> Any:
    def verify() -> tuple[bool, str]:
        """Output and final state equal reference's, every bit, on the inputs that are timed.

        On an accelerator from the same float front end on: it is made on the CPU, where the judge runs.
        """
        on_cpu: Inputs = tuple(x.cpu() for x in inputs)  # type: ignore[assignment]
        scales = {k: s.cpu() for k, s in arithmetic.scales.items()}
        judge = IntegerArithmetic(arithmetic.scheme, scales, get_backend("reference"))
        if inputs[0].device.type == "cpu":
            expected, state = run(on_cpu, p, judge)
            found, own_state = run(inputs, p, arithmetic)
        else:
            front = prepare(*on_cpu, p.chunk_size, True)
            expected, state = run_front(front, judge, p)
            found, own_state = run_front(front.to(inputs[0].device), arithmetic, p)
        wrong = int((found.cpu() != expected).sum()) + int((own_state.codes.cpu().long() != state.codes).sum())
        return wrong == 0, f"{wrong} of {expected.numel() + state.codes.numel()} elements differ from reference"

    return verify


def _close(found: Tensor, expected: Tensor, decibels: float = 100.0) -> tuple[bool, str]:
    """Two float32 rules that sum in another order: 100 dB leaves 1e-5 of the signal."""
    value = sqnr(expected, found)
    return value >= decibels, f"{value:.0f} dB from the peer"
