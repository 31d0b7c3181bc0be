"""Matrices and gates that come in files: tensors by name, checked, as families."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import QDeltaNetError
from .families import Family, Gates, Shape, correlated_keys, iid_keys, repeated_keys, silu_keys

KEYS = {"iid": iid_keys, "silu": silu_keys, "correlated": correlated_keys, "repeated": repeated_keys}


def check_matrices(A: Tensor, where: str = "A") -> Tensor:
    """A as float64 [H, M, C, C]; [C, C] and [M, C, C] count as one head.

    Raises QDeltaNetError for another shape, no matrix, NaN or infinity, a chunk size that is no power of two, and
    entries on or above the diagonal.
    """
    if A.dim() not in (2, 3, 4) or A.shape[-1] != A.shape[-2] or not A.is_floating_point():
        shape = f"{list(A.shape)} {str(A.dtype).removeprefix('torch.')}"
        raise QDeltaNetError(f"{where} {shape}: need floating point [C, C], [M, C, C] or [H, M, C, C]")
    size = A.shape[-1]
    if size < 2 or size & (size - 1):
        raise QDeltaNetError(f"{where}: chunk size {size} is no power of two; pad with zero rows and columns")
    if A.numel() == 0:
        raise QDeltaNetError(f"{where} {list(A.shape)}: holds no matrix")
    A = A.to(torch.float64).reshape(*([1] * (4 - A.dim())), *A.shape)
    if not bool(A.isfinite().all()):
        raise QDeltaNetError(f"{where}: holds NaN or infinity")
    if bool(A.triu().any()):
        place = "diagonal" if bool(A.diagonal(dim1=-2, dim2=-1).any()) else "upper triangle"
        raise QDeltaNetError(f"{where}: its {place} is not zero; give the strictly lower A of T = (I - A)^-1")
    return A


def gates_in(found: Mapping[str, Tensor], where: str) -> dict[str, Gates]:
    """Recorded gates by name, from tensors `<name>.beta` and `<name>.g`, each [tokens, heads]; where: the file.

    They are cut into chunks; a family asked for other heads takes them spread evenly, or again and again. Raises
    QDeltaNetError for a missing partner, another shape, NaN, beta outside of [0, 2] or g above 0.
    """
    names = sorted({key.rpartition(".")[0] for key in found if key.endswith((".beta", ".g"))})
    if not names:
        listed = ", ".join(sorted(found)) or "(none)"
        raise QDeltaNetError(f"{where}: no <name>.beta with <name>.g; tensors are {listed}")
    return {name: _recorded(where, name, *_pair(where, name, found)) for name in names}


def _pair(where: str, name: str, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for part in ("beta", "g"):
        if f"{name}.{part}" not in found:
            raise QDeltaNetError(f"{where}: {name}.{part} is missing; gates come in pairs <name>.beta and <name>.g")
    beta, g = found[f"{name}.beta"].double(), found[f"{name}.g"].double()
    if beta.dim() != 2 or beta.shape != g.shape or beta.numel() == 0:
        shapes = f"{name}.beta {list(beta.shape)} and .g {list(g.shape)}"
        raise QDeltaNetError(f"{where}: {shapes}: need [tokens, heads] twice")
    if not (bool(((beta >= 0) & (beta <= 2)).all()) and bool((g <= 0).all() and g.isfinite().all())):
        raise QDeltaNetError(f"{where}: {name}: need beta in [0, 2] and finite g <= 0, without NaN")
    return beta, g


def _recorded(where: str, name: str, beta: Tensor, g: Tensor) -> Gates:
    tokens, recorded = beta.shape

    def gates(shape: Shape, make: torch.Generator) -> tuple[Tensor, Tensor]:
        chunks = tokens // shape.chunk_size
        if chunks == 0:
            raise QDeltaNetError(f"{where}: {name} has {tokens} tokens, fewer than a chunk of {shape.chunk_size}")
        which = torch.randint(0, chunks, (shape.matrices,), generator=make)
        heads = torch.arange(shape.heads)
        heads = heads * recorded // shape.heads if shape.heads < recorded else heads % recorded
        used = chunks * shape.chunk_size
        beta_cut, g_cut = (x[:used].T.unflatten(1, (chunks, -1))[heads][:, which] for x in (beta, g))
        return beta_cut, g_cut

    return gates


def gate_families(found: Mapping[str, Tensor], where: str) -> list[Family]:
    """One family per pair of gates and kind of keys, `<name>/<kind>`. Raises QDeltaNetError as `gates_in` does."""
    return [
        Family(f"{name}/{kind}", f"{kind} keys, gates {name} of {where}", keys, gates, _limit(found[f"{name}.beta"]))
        for name, gates in gates_in(found, where).items()
        for kind, keys in KEYS.items()
    ]


def _limit(beta: Tensor) -> float:
    """1, or 2 for gates with negative eigenvalues."""
    return 1.0 if float(beta.max()) <= 1 else 2.0
