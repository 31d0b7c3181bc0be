"""The suite: cases that any backend runs, each a name and a function from a backend to named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core import (
    Backend,
    IntegerArithmetic,
    IntFormat,
    NonFiniteError,
    Operand,
    RuleScheme,
    difference_decay,
)
from ..delta_rule import bind, prepare, run_front
from ..inverse import Plan, plan, run_plan, unfit_factor
from .inputs import (
    ALL_KINDS,
    FEEDBACK_KINDS,
    FORMATS,
    LARGE_PLANS,
    METHOD_PLANS,
    PATTERNS,
    PLANS,
    Inputs,
    Kind,
    adversarial_inputs,
    bound_rule,
    inverse_scheme,
    lower_codes,
    mixed_scheme,
    observed_scales,
    rule_inputs,
)
from .recording import Recording

Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """run(backend, device) computes the case and returns named tensors on the CPU, to be equal to reference's."""

    section: str
    name: str
    run: Callable[[Backend, torch.device], Outcome]


def suite(quick: bool = False) -> list[Case]:
    """Every case. quick: one plan and one format less of everything, for slow backends (an interpreter)."""
    return [*_decay(), *_products(quick), *_inverses(quick), *_rules(quick), *_feedback(quick), *_layers(quick)]


# -- products of codes -------------------------------------------------------------------------------------------------

PRODUCTS = ((1, 1, 1), (3, 5, 7), (16, 16, 16), (33, 64, 17), (64, 128, 64))
CODE_PATTERNS = ("random", "max", "minus", "alternating", "zero", "one hot")


def code_matrix(pattern: str, shape: tuple[int, ...], fmt: IntFormat, seed: int) -> Tensor:
    """float32 codes of a format: [..., M, N]."""
    q = fmt.qmax
    if pattern == "random":
        return torch.randint(-q, q + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    if pattern == "alternating":
        return torch.where(torch.arange(shape[-1]) % 2 == 0, float(q), float(-q)).expand(shape).contiguous()
    x = torch.full(shape, {"max": float(q), "minus": float(-q)}.get(pattern, 0.0))
    if pattern == "one hot":
        x[..., 0, -1] = q
    return x


def _products(quick: bool) -> Iterator[Case]:
    formats = (4, 8, 16) if quick else FORMATS
    for left in formats:
        for right in formats:
            for m, k, n in PRODUCTS:
                for pattern in CODE_PATTERNS[: 3 if quick else None]:
                    run_case = partial(_product, IntFormat(left), IntFormat(right), (m, k, n), pattern)
                    yield Case("product", f"int{left} x int{right} [{m}, {k}] @ [{k}, {n}] {pattern}", run_case)


def _product(
    left: IntFormat, right: IntFormat, size: tuple[int, int, int], pattern: str, backend: Backend, device: torch.device
) -> Outcome:
    """Contiguous, transposed, strided and broadcast operands; a batch of 3."""
    m, k, n = size
    a = code_matrix(pattern, (3, 1, m, k), left, 1).to(device)
    b = code_matrix("random" if pattern != "max" else "max", (3, 2, k, n), right, 2).to(device)
    wide = code_matrix("random", (3, 1, m, 2 * k), left, 3).to(device)
    limits = left.qmax, right.qmax
    found = {
        "contiguous": backend.matmul(a, b, *limits),
        "transposed": backend.matmul(a, b.mT.contiguous().mT, *limits),
        "strided": backend.matmul(wide[..., ::2], b, *limits),
        "no batch": backend.matmul(a[0, 0], b[0, 0], *limits),
    }
    return {name: x.to(torch.int64).cpu() for name, x in found.items()}


# -- plans -------------------------------------------------------------------------------------------------------------


def _inverses(quick: bool) -> Iterator[Case]:
    plans = PLANS if quick else PLANS | LARGE_PLANS
    formats = (4, 8, 16) if quick else FORMATS
    for plan_name, p in plans.items():
        for kind_name, kind in ALL_KINDS.items():
            for bits in formats if p.chunk_size < 64 else (8, 16):
                for pattern in PATTERNS if p.chunk_size < 64 and not quick else PATTERNS[:3]:
                    name = f"{plan_name}, {kind_name}, int{bits}, {pattern}"
                    yield Case("inverse", name, partial(_inverse, p, kind, bits, pattern))
    yield from _methods(quick)


def _methods(quick: bool) -> Iterator[Case]:
    """Methods beside those that recipes ship with: fewer formats and patterns of each."""
    for plan_name, p in METHOD_PLANS.items():
        for kind_name in ("per_head", "finest dynamic", "fixed_point") if quick else ALL_KINDS:
            kind = ALL_KINDS[kind_name]
            if unfit_factor(p, kind.requantize) is not None:
                continue
            for bits in (8,) if quick else (4, 8, 16):
                for pattern in ("random",) if quick else ("random", "minus ones"):
                    name = f"{plan_name}, {kind_name}, int{bits}, {pattern}"
                    yield Case("inverse", name, partial(_inverse, p, kind, bits, pattern))


def _inverse(p: Plan, kind: Kind, bits: int, pattern: str, backend: Backend, device: torch.device) -> Outcome:
    scheme, scales = inverse_scheme(p, bits, kind, p.chunk_size)
    held = scheme.sites["A"].held
    assert held is not None
    codes = lower_codes(pattern, p.chunk_size, held).to(device)
    if backend.name == "reference":
        codes = codes.long()
    ar = IntegerArithmetic(scheme, _on(scales, device), backend)
    A = Operand("A", codes, torch.full((1, 1, 1), 1.0, device=device) / held.qmax, held)
    try:
        T = run_plan(p, A, ar)
    except NonFiniteError as e:
        return {f"NaN or Inf at {e.site}": torch.ones(1)}
    assert T is not None
    return _outcome(ar, T=T)


# -- the whole rule ----------------------------------------------------------------------------------------------------


def _rules(quick: bool) -> Iterator[Case]:
    formats = (8, 16) if quick else FORMATS
    plans = {"eager": PLANS["eager"]} if quick else PLANS | {"eager, C = 64": LARGE_PLANS["eager, C = 64"]}
    for plan_name, p in plans.items():
        for kind_name, kind in ALL_KINDS.items():
            for bits in formats if p.chunk_size < 64 else (8,):
                name = f"{plan_name}, {kind_name}, int{bits}"
                tokens = 2 * p.chunk_size + 5
                inputs = rule_inputs(3, tokens, 1, 2, 16, 8, seed=bits)
                yield Case("rule", f"{name}, random", partial(_rule, p, kind, bits, inputs, inputs, True))
    p = PLANS["radix 2"]
    mixed = rule_inputs(1, 64, 2, 4, 16, 8, seed=1)
    for kind_name, kind in ALL_KINDS.items():
        yield Case("rule", f"radix 2, {kind_name}, mixed formats", partial(_mixed, p, kind, mixed))
    other = rule_inputs(2, 64, 1, 2, 16, 8)  # static scales come from other data: most of these saturate somewhere
    for kind_name, kind in ALL_KINDS.items():
        for bits in (8,) if quick else formats:
            for pattern, inputs in adversarial_inputs().items():
                if not (pattern == "all max" and kind.scale == "dynamic"):
                    name = f"radix 2, {kind_name}, int{bits}, {pattern}"
                    yield Case("rule", name, partial(_rule, p, kind, bits, other, inputs, False))


def _feedback(quick: bool) -> Iterator[Case]:
    """States that keep what rounding lost: over chunks, and token by token as in decode."""
    for how, p in {"eager": PLANS["eager"], "decode": plan("identity", 1)}.items():
        for kind_name, kind in FEEDBACK_KINDS.items():
            for bits in (8,) if quick else (4, 8, 16):
                inputs = rule_inputs(2, 2 * p.chunk_size + 5, 1, 2, 16, 8, seed=bits)
                yield Case("rule", f"{how}, {kind_name}, int{bits}", partial(_fed_back, p, kind, bits, inputs))


def _fed_back(p: Plan, kind: Kind, bits: int, inputs: Inputs, backend: Backend, device: torch.device) -> Outcome:
    other = rule_inputs(2, 40, 1, 2, 16, 8)  # scales of prefill, some of which the inputs outgrow
    scheme, scales = bound_rule(other, PLANS["eager"], bits, kind)
    return _run_rule(scheme, scales, p, inputs, True, backend, device)


def _rule(
    p: Plan,
    kind: Kind,
    bits: int,
    seen: Inputs,
    inputs: Inputs,
    normalise: bool,
    backend: Backend,
    device: torch.device,
) -> Outcome:
    scheme, scales = bound_rule(seen, p, bits, kind)
    return _run_rule(scheme, scales, p, inputs, normalise, backend, device)


def _mixed(p: Plan, kind: Kind, inputs: Inputs, backend: Backend, device: torch.device) -> Outcome:
    scheme = bind(mixed_scheme(p, kind), p, inputs[0].shape[-1])
    return _run_rule(scheme, observed_scales(inputs, p, scheme), p, inputs, True, backend, device)


def _run_rule(
    scheme: RuleScheme,
    scales: dict[str, Tensor],
    p: Plan,
    inputs: Inputs,
    normalise: bool,
    backend: Backend,
    device: torch.device,
) -> Outcome:
    """Fused where the backend can, and step by step with every site recorded.

    The float front end is made on the CPU once: exp and the sums of a norm differ between devices, codes must not.
    """
    found: Outcome = {}
    front = prepare(*inputs, p.chunk_size, normalise).to(device)
    for fused in (True, False):
        ar = Recording(scheme, _on(scales, device), backend, fused=fused)
        output, state = run_front(front, ar, p)
        how = "fused " if fused else ""
        found |= {f"{how}{name}": x for name, x in _outcome(ar, state=state).items()}
        found[f"{how}output"] = output.cpu()
        if not fused:
            for i, (site, codes, _) in enumerate(ar.seen):
                found[f"{i} {site}"] = codes.to(torch.int64).cpu()
    return found


def _layers(quick: bool) -> Iterator[Case]:
    """Shapes of real layers: heads of 128, grouped keys, an odd batch."""
    if quick:
        return
    p = LARGE_PLANS["eager, C = 64"]
    for bits in (4, 8, 16):
        for kind_name in ("per_head", "finest dynamic", "fixed_point"):
            inputs = rule_inputs(1, 130, 2, 4, 128, 128, seed=bits)
            run_case = partial(_rule, p, ALL_KINDS[kind_name], bits, inputs, inputs, True)
            yield Case("layer", f"2 key / 4 value heads of 128, C = 64, {kind_name}, int{bits}", run_case)


def _decay() -> Iterator[Case]:
    yield Case("decay", "exp2 over all of Q16 down to -20", _exp2)


def _exp2(backend: Backend, device: torch.device) -> Outcome:
    x = torch.arange(-(20 << 16), 1, dtype=torch.int32, device=device)
    return {"exp2": difference_decay(x).cpu()}


def _on(scales: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: scale.to(device) for key, scale in scales.items()}


def _outcome(ar: IntegerArithmetic, **operands: Operand) -> Outcome:
    found: Outcome = {}
    for name, x in operands.items():
        found[name] = x.codes.to(torch.int64).cpu()
        if x.scale is not None:
            found[f"scale of {name}"] = x.scale.expand(x.codes.shape).cpu()
        if x.residual is not None:
            found[f"residual of {name}"] = x.residual.codes.to(torch.int64).cpu()
    for site, n in sorted(ar.saturated.items()):
        found[f"clipped at {site}"] = torch.tensor([n])
    return found
