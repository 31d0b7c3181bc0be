"""Kernels as text: one requantization after the other, registers as local variables.

A kernel is generated for a plan and the kinds of scale of its sites; what differs from layer to layer (the
multipliers) it reads from memory. The text is ordinary Triton and is kept where tracebacks and debuggers find it.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import Granularity, IntFormat, Mode, Term
from ...core.requantize import fixed_point_bits, fixed_point_multipliers
from ...core.terms import multipliers, part_of_scale
from . import primitives
from .pack import Pack
from .trace import Call, is_dynamic

# None keeps no axis: one scale for the tile.
AXES = {Granularity.PER_HEAD: None, Granularity.PER_TOKEN: 1, Granularity.PER_CHANNEL: 0}


@dataclass(frozen=True)
class Value:
    """A register in the kernel: the variable of its codes, and that of its scale where it is computed on the chip."""

    variable: str
    site: str
    format: IntFormat
    scale: str | None = None

    @property
    def is_wide(self) -> bool:
        """Whether its codes are held in int16 and multiplied as bytes."""
        return self.format.bits > 8


@dataclass(frozen=True)
class Summand:
    """An accumulator or a register as a term: its variable, and for each scale of the term the variable that holds it,
    None where it is static."""

    variable: str
    scales: tuple[str | None, ...]


@dataclass
class Lines:
    """The body of a kernel as it is written."""

    lines: list[str] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)
    names: int = 0

    def let(self, hint: str, text: str) -> str:
        """`name = text` under a fresh name."""
        self.names += 1
        name = f"{''.join(c if c.isalnum() else '_' for c in hint)}_{self.names}"
        self.lines.append(f"{name} = {text}")
        return name

    def mask(self, condition: str) -> str:
        """The variable of a condition on i and j."""
        if condition not in self.masks:
            self.masks[condition] = self.let("keep", condition)
        return self.masks[condition]


@dataclass
class Writer(Lines):
    """A body in integers, the numbers it reads, and what it reports.

    counts: variables that count what saturated, by site. trouble: variables that are not 0 where the steps would raise.
    """

    mode: Mode = "float"
    pack: Pack = field(default_factory=lambda: Pack(1, 1, 1, (1, 1), torch.float32))
    counts: dict[str, list[str]] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)

    def dot(self, hint: str, left: Value, right: Value, bound: int, right_text: str = "") -> str:
        """left @ right as an accumulator that holds `bound`."""
        flags = f"{left.is_wide}, {right.is_wide}, {bound >= 2**31}"
        return self.let(hint, f"dot_codes({left.variable}, {right_text or right.variable}, {flags})")

    def requantize(self, site: str, call: Call, summands: Sequence[Summand], keep: str | None = None) -> Value:
        """Codes of the sum, masked by the condition `keep`; counts what saturates."""
        if self.mode == "float":
            return self._float(site, call, summands, keep)
        return self._integer(site, call, summands, keep)

    def _float(self, site: str, call: Call, summands: Sequence[Summand], keep: str | None) -> Value:
        total = ""
        for term, summand in zip(call.terms, summands, strict=True):
            factors = self._factors(call, term, summand)
            product = " * ".join([f"{summand.variable}.to(tl.float32)", *factors])
            total = self.let("r", f"{total} + {product}" if total else product)
        fmt = call.target.format
        if isinstance(call.target.scale, Tensor):
            if keep is not None:
                total = self.let("r", f"tl.where({self.mask(keep)}, {total}, 0.0)")
            return self._saturated(site, f"to_codes({total}, {fmt.qmax})", fmt)
        self.trouble.append(self.let("bad", f"not_finite({total})"))
        if keep is not None:
            total = self.let("r", f"tl.where({self.mask(keep)}, {total}, 0.0)")
        scale = self.let("scale", f"dynamic_scale({total}, {AXES[call.target.scale]}, {fmt.qmax})")
        codes = self.let(site, f"round_half_even(tl.div_rn({total}, {scale})).to({container(fmt)})")
        return Value(codes, site, fmt, scale)

    def _integer(self, site: str, call: Call, summands: Sequence[Summand], keep: str | None) -> Value:
        fixed, shift = fixed_point_multipliers(call.terms, call.target)
        before, _ = fixed_point_bits([t.bound for t in call.terms])
        total = ""
        for term, summand, m, p in zip(call.terms, summands, fixed, before, strict=True):
            acc = f"{summand.variable}.to(tl.int64)"
            acc = f"shift_half_away({acc}, {p})" if p else acc
            product = f"{acc} * {self._read(call, term, m)}"
            total = self.let("r", f"{total} + {product}" if total else product)
        total = self.let("r", f"shift_half_away({total}, {self.pack.add(shift)})")
        if keep is not None:
            total = self.let("r", f"tl.where({self.mask(keep)}, {total}, 0)")
        return self._saturated(site, f"saturate({total}, {call.target.format.qmax})", call.target.format)

    def _saturated(self, site: str, text: str, fmt: IntFormat) -> Value:
        self.names += 1
        outside = f"outside_{self.names}"
        self.lines.append(f"codes, {outside} = {text}")
        self.counts.setdefault(site, []).append(outside)
        return Value(self.let(site, f"codes.to({container(fmt)})"), site, fmt)

    def _factors(self, call: Call, term: Term, summand: Summand) -> list[str]:
        """The multiplier of a term as one or two factors: read where all scales are static, else computed."""
        out = call.target.scale if isinstance(call.target.scale, Tensor) else None
        out = part_of_scale(out, term)
        if not any(summand.scales):
            return [self._read(call, term, m) for m in multipliers(term.scales, out, term.sign)]
        pairs = zip(term.scales, summand.scales, strict=True)
        sources = [(scale, name or self._read(call, term, scale), False) for scale, name in pairs]
        if out is not None:
            sources.append((out, self._read(call, term, out), True))
        return [self.let("m", text) for text in _quotients(sources, term.sign)]

    def _read(self, call: Call, term: Term, m: Tensor) -> str:
        """Text that loads what was made for the part of the output that a term covers."""
        return self.pack.add(m, call.blocks, term.region, term.blocks)


def _quotients(sources: Sequence[tuple[Tensor, str, bool]], sign: int) -> list[str]:
    """`core.requantize.multipliers` as text: products and quotients in float64, rounded once to float32.

    sources: (scale or its stand-in, text of its value, whether to divide by it).
    """
    columns = [s for s in sources if s[0].shape[-1] > 1]
    rows = [s for s in sources if s[0].shape[-1] == 1]
    groups = [rows, columns] if columns and any(s[0].shape[-2] > 1 for s in rows) else [rows + columns]
    result = []
    for n, group in enumerate(groups):
        text = ""
        for _, value, inverse in group:
            factor = f"({value}).to(tl.float64)"
            if not text:
                text = f"1.0 / {factor}" if inverse else factor
            else:
                text += f" / {factor}" if inverse else f" * {factor}"
        result.append(f"({'-' if n == 0 and sign < 0 else ''}({text})).to(tl.float32)")
    return result


def container(fmt: IntFormat) -> str:
    """What codes are held in, in a kernel."""
    return "tl.int8" if fmt.bits <= 8 else "tl.int16"


def code_dtype(fmt: IntFormat) -> torch.dtype:
    """What codes are held in, in memory."""
    return torch.int8 if fmt.bits <= 8 else torch.int16


def padded(size: int) -> int:
    """An int8 dot takes powers of two and contracts 32 at least."""
    return max(32, int(triton.next_power_of_2(size)))


def dynamic(scale: Tensor, variable: str) -> str | None:
    """The variable of a scale that is computed or read per matrix; None for a static one."""
    return variable if is_dynamic(scale) else None


def kernel_text(name: str, parameters: Sequence[str], body: Sequence[str]) -> str:
    lines = [f"def {name}({', '.join(parameters)}):", *("    " + line for line in body)]
    return "@triton.jit\n" + "\n".join(lines) + "\n"


@lru_cache(maxsize=512)
def load_kernel(name: str, text: str) -> Any:
    """The Triton kernel of a text; the same text is compiled once."""
    file = f"<{name} {sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": f"{__package__}.generated"}
    scope |= {key: getattr(primitives, key) for key in vars(primitives) if not key.startswith("_")}
    exec(compile(text, file, "exec"), scope)
    return scope[name]
