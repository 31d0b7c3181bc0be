"""Around a generated kernel: its indices, inputs and results, what it remembers, and its launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...core import Granularity, IntegerArithmetic, Operand
from ...core.granularity import reduced_dims
from .trace import is_dynamic
from .writer import Value, Writer, code_dtype, kernel_text, load_kernel

REMEMBERED = 64  # kernels of one arithmetic: its three, for some shapes


@dataclass(frozen=True)
class Prepared:
    """A kernel and what it reads beside its inputs.

    sites: columns of the counts. checked: whether the kernel reports numbers that are not finite.
    """

    kernel: Any
    multipliers: Tensor
    sites: tuple[str, ...]
    checked: bool
    warps: int


_prepared: WeakKeyDictionary[IntegerArithmetic, dict[Any, tuple[Prepared, list[Tensor]]]] = WeakKeyDictionary()


def prepared(
    arithmetic: IntegerArithmetic, key: tuple[Any, ...], inputs: Sequence[Operand], make: Callable[[], Prepared]
) -> Prepared:
    """`make()`, remembered while the arithmetic lives and all static scales stay what they are."""
    static = [*arithmetic.scales.values()]
    static += [x.scale for x in inputs if x.scale is not None and not is_dynamic(x.scale)]
    versions = tuple((id(s), 0 if s.is_inference() else s._version) for s in static)
    whole = (*key, *map(_layout, inputs), versions)
    kept = _prepared.setdefault(arithmetic, {})
    if whole not in kept:
        if len(kept) >= REMEMBERED:
            kept.clear()
        kept[whole] = make(), static  # tensors that live on keep their id
    return kept[whole][0]


def _layout(x: Operand) -> tuple[Any, ...]:
    scale = tuple(x.scale.shape[-2:]) if x.scale is not None and is_dynamic(x.scale) else None
    return tuple(x.codes.shape[-3:]), x.codes.device, x.format, scale


def pointers(x: Operand) -> list[Tensor]:
    """[codes, scale] as a kernel reads them: contiguous, a dynamic scale for every matrix."""
    codes, scale = x.codes.contiguous(), x.scale
    assert scale is not None
    if is_dynamic(scale):
        scale = scale.expand(*codes.shape[:-2], *scale.shape[-2:]).contiguous()
    return [codes, scale]


def load_codes(pointer: str, matrix: str, rows: int, columns: int, index: str, container: str) -> str:
    """Text that loads a tile of codes [rows, i] x [columns, index], zeros in the padding."""
    where = f"{pointer} + {matrix} * {rows * columns} + i * {columns} + {index}"
    return f"tl.load({where}, mask=(i < {rows}) & ({index} < {columns}), other=0).to({container})"


def load_scale(scale: Tensor | None, pointer: str, matrix: str, index: str, size: int) -> str | None:
    """Text that loads a dynamic scale along `index` (or one for the matrix); None for a static scale."""
    if scale is None or not is_dynamic(scale):
        return None
    if scale.shape[-1] == scale.shape[-2] == 1:
        return f"tl.load({pointer} + {matrix})"
    return f"tl.load({pointer} + {matrix} * {size} + {index}, mask={index} < {size}, other=1.0)"


def store_codes(w: Writer, result: Value, pointer: str, rows: int, columns: int, granularity: Granularity) -> None:
    """Store codes on i and j, and their scale where the kernel made it."""
    where = f"{pointer} + matrix * {rows * columns} + i * {columns} + j"
    w.lines.append(f"tl.store({where}, {result.variable}, mask=(i < {rows}) & (j < {columns}))")
    if result.scale is None:
        return
    index = {Granularity.PER_TOKEN: "i", Granularity.PER_CHANNEL: "j"}.get(granularity, "")
    size = rows if index == "i" else columns
    kept = f"matrix * {size} + {index}, {result.scale}, mask={index} < {size}" if index else f"matrix, {result.scale}"
    w.lines.append(f"tl.store({pointer}_scale + {kept})")


def finish(name: str, inputs: Sequence[str], w: Writer, device: torch.device) -> Prepared:
    """The kernel of what was written. inputs: names of its pointers."""
    tall, wide = w.pack.padded
    header = [
        "matrix = tl.program_id(0).to(tl.int64)",
        f"multipliers += (matrix % heads) * {w.pack.width}",
        f"i = tl.arange(0, {tall})[:, None]",
        f"j = tl.arange(0, {wide})[None, :]",
    ]
    report = []
    for n, found in enumerate(w.counts.values()):
        report.append(f"tl.store(counts + matrix * {len(w.counts)} + {n}, {' + '.join(found)})")
    if w.trouble:
        report.append(f"tl.store(bad + matrix, {' + '.join(w.trouble)})")
    text = kernel_text(name, [*inputs, "multipliers", "counts", "bad", "heads"], [*header, *w.lines, *report])
    warps = 4 if max(tall, wide) <= 64 else 8
    return Prepared(load_kernel(name, text), w.pack.tensor(device), tuple(w.counts), bool(w.trouble), warps)


def empty_result(arithmetic: IntegerArithmetic, site: str, shape: Sequence[int], device: torch.device) -> Operand:
    """The operand that a kernel fills: codes, and the scale where it is dynamic."""
    scheme = arithmetic.site(site)
    assert scheme.held is not None
    scale = arithmetic.out_scale(site, scheme, shape)
    if isinstance(scale, Granularity):
        dims = {d % len(shape) for d in reduced_dims(scale)}
        kept = [1 if d in dims else n for d, n in enumerate(shape)]
        scale = torch.empty(kept, dtype=torch.float32, device=device)
    return Operand(site, torch.empty(*shape, dtype=code_dtype(scheme.held), device=device), scale, scheme.held)


def launch(arithmetic: IntegerArithmetic, ready: Prepared, inputs: Sequence[Tensor], matrices: int, heads: int) -> bool:
    """Run a kernel and count what saturated; False where it met a number that is not finite."""
    device = ready.multipliers.device
    counts = torch.empty(matrices, max(1, len(ready.sites)), dtype=torch.int32, device=device)
    bad = torch.empty(matrices, dtype=torch.int32, device=device)
    with torch.cuda.device_of(counts):
        ready.kernel[(matrices,)](
            *inputs, ready.multipliers, counts, bad, heads, num_warps=ready.warps, enable_fp_fusion=False
        )
    if ready.checked and bool(bad.any()):
        return False
    totals = counts.sum(0)
    for n, site in enumerate(ready.sites):
        arithmetic.count(site, totals[n])
    return True
