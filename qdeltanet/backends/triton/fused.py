"""The fused kernels: a plan, the front that makes A and inverts it, the back that multiplies with T.

Each gives what the steps give, to the bit, saturation counts included, or None where the steps have to run: for
schemes that `declines` names, and for numbers that are not finite, where the steps raise and say at which site.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import (
    COEFFICIENT_MAX,
    FLOAT32_EXACT,
    IntegerArithmetic,
    IntFormat,
    Operand,
    Term,
    product_bound,
)
from ...core.requantize import NARROW_LIMIT
from ...inverse import INPUT, OUTPUT, Plan
from .launch import Prepared, empty_result, finish, launch, load_codes, load_scale, pointers, prepared, store_codes
from .matmul import runs_on
from .pack import Pack
from .plans import CHUNK_SIZES, declines, declines_site, write_plan
from .trace import Call, front_fraction, is_dynamic, trace_back, trace_front, trace_plan
from .writer import Summand, Value, Writer, container, padded

MAX_WIDTH = 256  # of a head: a program holds all of its channels


def _writer(arithmetic: IntegerArithmetic, heads: int, rows: int, columns: int) -> Writer:
    mode = arithmetic.scheme.requantize
    dtype = torch.float32 if mode == "float" else torch.int64
    return Writer(mode=mode, pack=Pack(heads, rows, columns, (padded(rows), padded(columns)), dtype))


def _runs(arithmetic: IntegerArithmetic, operands: list[Operand], *more: Tensor) -> bool:
    """Whether a kernel may run on these at all: integers, something to do, no gradient asked for."""
    for x in operands:
        if x.format is None or x.scale is None or x.codes.dim() < 3:
            return False
        if is_dynamic(x.scale) and arithmetic.scheme.requantize != "float":
            return False
    tensors = [*(x.codes for x in operands), *more]
    return all(t.numel() > 0 and not t.requires_grad and runs_on(t.device) for t in tensors)


def _format(x: Operand) -> IntFormat:
    assert x.format is not None
    return x.format


def _scale(x: Operand) -> Tensor:
    assert x.scale is not None
    return x.scale


def _matrices(x: Tensor) -> int:
    return x.numel() // (x.shape[-1] * x.shape[-2])


# -- a plan ----------------------------------------------------------------------------------------------------------


def run_plan(arithmetic: IntegerArithmetic, plan: Plan, A: Operand) -> Operand | None:
    """T - I from A, both [..., H, C, C]: one program for each matrix, all registers on the chip."""
    if declines(plan, arithmetic.scheme) is not None or not _runs(arithmetic, [A]):
        return None
    if A.codes.shape[-2:] != (plan.chunk_size, plan.chunk_size):
        return None
    ready = prepared(arithmetic, ("run_plan", plan), [A], lambda: plan_kernel(arithmetic, plan, A))
    T = empty_result(arithmetic, OUTPUT, A.codes.shape, A.codes.device)
    inputs = [*pointers(A), T.codes, _scale(T)]
    return T if launch(arithmetic, ready, inputs, _matrices(A.codes), A.codes.shape[-3]) else None


def plan_kernel(arithmetic: IntegerArithmetic, plan: Plan, A: Operand) -> Prepared:
    """kernel(A, A_scale, T, T_scale, multipliers, counts, bad, heads)."""
    size, heads = plan.chunk_size, A.codes.shape[-3]
    w = _writer(arithmetic, heads, size, size)
    variable = w.let("A", load_codes("A", "matrix", size, size, "j", container(_format(A))))
    index = "i" if _scale(A).shape[-2] > 1 else "j"
    scale = load_scale(A.scale, "A_scale", "matrix", index, size)
    value = Value(variable, INPUT, _format(A), None if scale is None else w.let("A_scale", scale))
    _finish_plan(w, arithmetic, plan, iter(trace_plan(arithmetic, plan, A)), value)
    return finish("plan_kernel", ["A", "A_scale", "T", "T_scale"], w, A.codes.device)


def _finish_plan(w: Writer, arithmetic: IntegerArithmetic, plan: Plan, calls: Iterator[Call], A: Value) -> None:
    size = plan.chunk_size
    T = write_plan(w, plan, arithmetic.scheme, calls, A)
    assert next(calls, None) is None, "the kernel and the steps disagree"
    store_codes(w, T, "T", size, size, arithmetic.site(OUTPUT).held_granularity)


# -- front: k -> T ---------------------------------------------------------------------------------------------------


def front(arithmetic: IntegerArithmetic, plan: Plan, k: Operand, write_decay: Tensor) -> Operand | None:
    """T - I from k [..., HK, C, K] and the write decay [..., H, C, C]: A never leaves the chip."""
    scheme, size = arithmetic.scheme, plan.chunk_size
    if declines(plan, scheme) is not None or not _runs(arithmetic, [k], write_decay):
        return None
    if k.codes.shape[-1] > MAX_WIDTH or scheme.sites["k"].carry is not None or write_decay.dtype != torch.float32:
        return None
    if k.codes.shape[:-3] != write_decay.shape[:-3] or write_decay.shape[-2:] != (size, size):
        return None
    heads = write_decay.shape[-3]
    ready = prepared(arithmetic, ("front", plan, heads), [k], lambda: front_kernel(arithmetic, plan, k, heads))
    T = empty_result(arithmetic, OUTPUT, write_decay.shape, write_decay.device)
    inputs = [*pointers(k), write_decay.contiguous(), T.codes, _scale(T)]
    return T if launch(arithmetic, ready, inputs, _matrices(write_decay), heads) else None


def front_kernel(arithmetic: IntegerArithmetic, plan: Plan, k: Operand, heads: int) -> Prepared:
    """kernel(k, k_scale, write_decay, T, T_scale, multipliers, counts, bad, heads)."""
    size, (key_heads, _, width) = plan.chunk_size, k.codes.shape[-3:]
    w = _writer(arithmetic, heads, size, size)
    w.lines.append(f"key = matrix // heads * {key_heads} + matrix % heads // {heads // key_heads}")
    w.lines.append(f"d = tl.arange(0, {padded(width)})[None, :]")
    value = Value(w.let("k", load_codes("k", "key", size, width, "d", container(_format(k)))), "k", _format(k))
    bound = product_bound(width, _format(k), _format(k))
    wide = _times_coefficient(w, w.dot("acc", value, value, bound, f"tl.trans({value.variable})"), bound, k, size)
    row, column = (load_scale(k.scale, "k_scale", "key", axis, size) for axis in "ij")
    scales = (row and w.let("k_row", row), column and w.let("k_column", column), None)
    calls = iter(trace_front(arithmetic, plan, k, heads))
    A = w.requantize(INPUT, next(calls), [Summand(wide, scales)])
    _finish_plan(w, arithmetic, plan, calls, A)
    return finish("front_kernel", ["k", "k_scale", "write_decay", "T", "T_scale"], w, k.codes.device)


def _times_coefficient(w: Writer, acc: str, bound: int, k: Operand, size: int) -> str:
    """The wide accumulator, exact or as the float32 that the exact one rounds to."""
    at = f"write_decay + matrix * {size * size} + i * {size} + j"
    decay = w.let("decay", f"tl.load({at}, mask=(i < {size}) & (j < {size}), other=0.0)")
    w.trouble.append(w.let("bad", f"tl.max(1 - (tl.abs({decay}) <= {COEFFICIENT_MAX}.0).to(tl.int32))"))
    codes = w.let("decay", f"coefficient_codes({decay}, {2.0 ** front_fraction(k)})")
    # both factors are exact in float32 up to 2^24, so their float32 product is the exact one rounded once
    factor = "tl.float32" if w.mode == "float" and bound <= FLOAT32_EXACT else "tl.int64"
    return w.let("wide", f"{acc}.to({factor}) * {codes}.to({factor})")


# -- back: T -> u, w -------------------------------------------------------------------------------------------------


def back(
    arithmetic: IntegerArithmetic, T: Operand, v_beta: Operand, k_beta: Operand
) -> tuple[list[Term], Operand] | None:
    """Terms of u = (I + T) v_beta [..., C, V], and w = (I + T) k_beta [..., C, K]."""
    operands = [T, v_beta, k_beta]
    if _back_declines(arithmetic, operands) or not _runs(arithmetic, operands):
        return None
    heads, size = T.codes.shape[-3:-1]
    ready = prepared(arithmetic, ("back",), operands, lambda: back_kernel(arithmetic, *operands))
    w = empty_result(arithmetic, "w", k_beta.codes.shape, T.codes.device)
    bound = product_bound(size, _format(T), _format(v_beta))
    u = torch.empty(v_beta.codes.shape, dtype=_accumulator(bound), device=T.codes.device)
    inputs = [*pointers(T), pointers(v_beta)[0], u, *pointers(k_beta), w.codes, _scale(w)]
    if not launch(arithmetic, ready, inputs, _matrices(u), heads):
        return None
    product = Term(u, (_scale(T), _scale(v_beta)), bound=bound)
    return [product, Term(v_beta.codes, (_scale(v_beta),), bound=_format(v_beta).qmax)], w


def _accumulator(bound: int) -> torch.dtype:
    """A container that holds an accumulator, float32 where it can: the terms that follow take it as it is."""
    if bound <= FLOAT32_EXACT:
        return torch.float32
    return torch.int32 if bound < NARROW_LIMIT else torch.int64


def _back_declines(arithmetic: IntegerArithmetic, operands: list[Operand]) -> bool:
    sites = arithmetic.scheme.sites
    if declines_site("w", arithmetic.scheme) is not None:
        return True
    if any(sites[x.site].carry is not None for x in operands):
        return True
    T, *others = (x.codes.shape for x in operands)
    return T[-1] not in CHUNK_SIZES or any(x[:-1] != T[:-1] or x[-1] > MAX_WIDTH for x in others)


def back_kernel(arithmetic: IntegerArithmetic, T: Operand, v_beta: Operand, k_beta: Operand) -> Prepared:
    """kernel(T, T_scale, v_beta, u, k_beta, k_beta_scale, w, w_scale, multipliers, counts, bad, heads)."""
    heads, size, width = k_beta.codes.shape[-3:]
    value_width = v_beta.codes.shape[-1]
    w = _writer(arithmetic, heads, size, width)
    w.lines.append(f"t = tl.arange(0, {padded(size)})[None, :]")
    w.lines.append(f"d = tl.arange(0, {padded(value_width)})[None, :]")
    left = Value(w.let("T", load_codes("T", "matrix", size, size, "t", container(_format(T)))), OUTPUT, _format(T))
    text = load_codes("v_beta", "matrix", size, value_width, "d", container(_format(v_beta)))
    right = Value(w.let("v_beta", text), "v_beta", _format(v_beta))
    u = w.dot("u", left, right, product_bound(size, _format(T), _format(v_beta)))
    at = f"u + matrix * {size * value_width} + i * {value_width} + d"
    w.lines.append(f"tl.store({at}, {u}, mask=(i < {size}) & (d < {value_width}))")
    _write_w(w, arithmetic, left, T, k_beta)
    inputs = ["T", "T_scale", "v_beta", "u", "k_beta", "k_beta_scale", "w", "w_scale"]
    return finish("back_kernel", inputs, w, T.codes.device)


def _write_w(w: Writer, arithmetic: IntegerArithmetic, left: Value, T: Operand, k_beta: Operand) -> None:
    """w = requantized T k_beta + k_beta."""
    size, width = k_beta.codes.shape[-2:]
    text = load_codes("k_beta", "matrix", size, width, "j", container(_format(k_beta)))
    right = Value(w.let("k_beta", text), "k_beta", _format(k_beta))
    acc = w.dot("acc", left, right, product_bound(size, _format(T), _format(k_beta)))
    row = load_scale(T.scale, "T_scale", "matrix", "i", size)
    column = load_scale(k_beta.scale, "k_beta_scale", "matrix", "j", width)
    T_scale, x_scale = row and w.let("T_scale", row), column and w.let("k_beta_scale", column)
    (call,) = trace_back(arithmetic, T, k_beta)
    result = w.requantize("w", call, [Summand(acc, (T_scale, x_scale)), Summand(right.variable, (x_scale,))])
    store_codes(w, result, "w", size, width, arithmetic.site("w").held_granularity)
