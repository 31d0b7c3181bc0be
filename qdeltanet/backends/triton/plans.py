"""A plan as lines of a kernel: registers are whole [C, C] tiles, zero outside of their masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...core import Region, RuleScheme, Side, product_bound
from ...inverse import INPUT, OUTPUT, Mask, Plan, Step, site_of
from ...inverse.geometry import StepGeometry, geometry
from .trace import Call
from .writer import Summand, Value, Writer

CHUNK_SIZES = (16, 32, 64, 128)
MAX_STEPS = 48


def declines(plan: Plan, scheme: RuleScheme) -> str | None:
    """Why a plan is not run by one kernel under this scheme; None where it is."""
    reasons = [declines_size(plan)]
    reasons += [declines_site(site, scheme) for site in (INPUT, OUTPUT, *map(site_of, plan.registers))]
    if OUTPUT in scheme.sites and scheme.sites[OUTPUT].carry is not None:
        reasons.append("site T: a carried T is requantized by the products that use it")
    return next((r for r in reasons if r is not None), None)


def declines_size(plan: Plan) -> str | None:
    """Why a plan does not fit a kernel, whatever it is run in."""
    if plan.chunk_size not in CHUNK_SIZES:
        return f"chunk size {plan.chunk_size}: kernels exist for {', '.join(map(str, CHUNK_SIZES))}"
    if not plan.steps:
        return "a plan without steps needs no kernel"
    if len(plan.steps) > MAX_STEPS:
        return f"{len(plan.steps)} steps: a kernel holds {MAX_STEPS} at most"
    for step in plan.steps:
        if step.is_sum or step.factor != 1 or step.mask.diagonal or step.mask.column is not None:
            return f"step {step}: a kernel takes products, and copies without a factor, below the diagonal"
    return None


def declines_site(site: str, scheme: RuleScheme) -> str | None:
    """Why a kernel cannot make or take this site; None where it can."""
    s = scheme.sites.get(site)
    if s is None or s.format is None:
        return f"site {site}: it has no integer format"
    if s.scale == "dynamic" and s.granularity.value == "per_tensor":
        return f"site {site}: a dynamic per_tensor scale spans heads, and a program sees one"
    return None


def block_condition(outer: int, size: int) -> str:
    """i and j in the same block."""
    return "" if outer >= size else f"(i // {outer} == j // {outer})"


def mask_condition(mask: Mask, size: int) -> str:
    """`Mask.matrix` as a condition on i and j, in every block."""
    parts = ["(i > j)", block_condition(mask.outer, size)]
    if mask.inner > 1:
        parts.append(f"(i // {mask.inner} != j // {mask.inner})")
    if mask.band is not None:
        parts.append(f"(i - j <= {mask.band})")
    if mask.rows is not None:
        parts.append(f"(i % {mask.outer} < {mask.rows})")
    return " & ".join(p for p in parts if p)


def part_condition(part: Region, outer: int, size: int) -> str:
    """Rows and columns of each block."""
    conditions = [block_condition(outer, size)]
    for axis, span in zip("ij", part, strict=True):
        index = axis if outer >= size else f"({axis} % {outer})"
        conditions.append(f"({index} >= {span.start})" if span.start else "")
        conditions.append(f"({index} < {span.stop})" if span.stop < outer else "")
    return " & ".join(c for c in conditions if c)


def write_plan(w: Writer, plan: Plan, scheme: RuleScheme, calls: Iterator[Call], A: Value) -> Value:
    """Append the steps of a plan; returns register T. calls: what the trace noted, in the same order."""
    registers = {INPUT: A}
    masks = {INPUT: Mask(1, plan.chunk_size)}
    for step, where in zip(plan.steps, geometry(plan), strict=True):
        w.lines.append(f"# {step}")
        if where is None:
            registers[step.out] = _copy(w, step, plan, registers[step.left], calls)
        else:
            operands = _Operands(w, plan, scheme, calls, registers, masks)
            registers[step.out] = _multiply(w, step, where, operands)
        masks[step.out] = step.mask
    return registers[OUTPUT]


def _copy(w: Writer, step: Step, plan: Plan, source: Value, calls: Iterator[Call]) -> Value:
    """A copy keeps codes and scale, except into T, which is stored like a sum."""
    keep = mask_condition(step.mask, plan.chunk_size)
    if step.out == OUTPUT:
        return w.requantize(OUTPUT, next(calls), [Summand(source.variable, (source.scale,))], keep)
    return replace(source, variable=w.let(step.out, f"tl.where({w.mask(keep)}, {source.variable}, 0)"))


class _Operands:
    """Registers as products and sums read them."""

    def __init__(
        self,
        w: Writer,
        plan: Plan,
        scheme: RuleScheme,
        calls: Iterator[Call],
        registers: dict[str, Value],
        masks: dict[str, Mask],
    ) -> None:
        self.w, self.plan, self.scheme, self.calls = w, plan, scheme, calls
        self.registers, self.masks = registers, masks

    def use(self, register: str, side: Side, part: Region, outer: int) -> Value:
        """Operand codes of a register. A carried one is requantized: a dynamic scale is that of the part which takes
        part, and saturation is counted in the blocks that the step sees."""
        x = self.registers[register]
        scheme, size = self.scheme.sites[x.site], self.plan.chunk_size
        if scheme.carry is None:
            return x
        condition = block_condition(outer, size) if self.masks[register].outer > outer else ""
        if scheme.scale == "dynamic":
            condition = part_condition(part, outer, size)
        seen = x.variable
        if condition:
            seen = self.w.let(f"{register}_{side}", f"tl.where({self.w.mask(condition)}, {seen}, 0)")
        return self.w.requantize(x.site, next(self.calls), [Summand(seen, (x.scale,))])


def _multiply(w: Writer, step: Step, where: StepGeometry, operands: _Operands) -> Value:
    assert step.right is not None
    size = operands.plan.chunk_size
    left = operands.use(step.left, "left", where.left, step.mask.outer)
    right = operands.use(step.right, "right", where.right, step.mask.outer)
    acc = w.dot("acc", left, right, product_bound(size, left.format, right.format))
    summands = [Summand(acc, (left.scale, right.scale))]
    for register, _ in step.addends:
        x = operands.registers[register]
        summands.append(Summand(x.variable, (x.scale,)))
    return w.requantize(site_of(step.out), next(operands.calls), summands, mask_condition(step.mask, size))
