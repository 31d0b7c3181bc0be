"""What the tests of several packages share: the conformance suite's inputs and schemes, and systems to invert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qdeltanet.backends import get_backend
from qdeltanet.conformance import recording
from qdeltanet.conformance.inputs import (
    FORMATS,
    INT16,
    INTEGER_KINDS,
    KINDS,
    PATTERNS,
    PLANS,
    Inputs,
    Kind,
    adversarial_inputs,
    bound_rule,
    collector,
    inverse_scheme,
    lower_codes,
    rule_inputs,
    rule_scheme,
    run,
)
from qdeltanet.conformance.recording import differing
from qdeltanet.core import RuleScheme
from qdeltanet.delta_rule import chunk_gated_delta_rule
from qdeltanet.inverse.families import system as ut_system

__all__ = [
    "FORMATS",
    "INT16",
    "INTEGER_KINDS",
    "KEY_FAMILIES",
    "KINDS",
    "PATTERNS",
    "PLANS",
    "Inputs",
    "Kind",
    "Recording",
    "adversarial_inputs",
    "bound_rule",
    "collector",
    "differing",
    "float_rule",
    "inverse_scheme",
    "lower_codes",
    "random_A",
    "rule_inputs",
    "rule_scheme",
    "run",
    "unit_keys",
    "ut_system",
]


def float_rule(inputs: Inputs, chunk_size: int = 64) -> Tensor:
    """The unquantized output with normalised keys."""
    return chunk_gated_delta_rule(*inputs, chunk_size=chunk_size, use_qk_l2norm_in_kernel=True)[0]


class Recording(recording.Recording):
    """The conformance suite's, with the backend by name."""

    def __init__(self, scheme: RuleScheme, scales: Mapping[str, Tensor], backend: str, **options: Any) -> None:
        super().__init__(scheme, scales, get_backend(backend), **options)


def unit_keys(family: str, tokens: int, width: int, make: torch.Generator) -> Tensor:
    """Normalised keys [tokens, width] of a family that is easy or hard on the inverse; float64."""
    keys = torch.randn(tokens, width, generator=make, dtype=torch.float64)
    if family == "correlated":
        keys = F.silu(0.5 * keys + torch.randn(1, width, generator=make, dtype=torch.float64))
    elif family == "repeated":
        keys = keys[torch.randint(0, 4, (tokens,), generator=make)]
    elif family == "orthogonal":
        keys = torch.eye(width, dtype=torch.float64)[torch.arange(tokens) % width]
    elif family == "equal":
        keys = keys[:1].expand(tokens, -1)
    elif family == "opposite":
        keys = keys[:1] * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[:, None].double()
    return F.normalize(keys, dim=-1)


KEY_FAMILIES = ("gauss", "correlated", "repeated", "orthogonal", "equal", "opposite")


def random_A(chunk_size: int, *, family: str = "gauss", heads: int = 3, seed: int = 0, width: int = 32) -> Tensor:
    """float64 [heads, C, C] from unit keys, beta in [0, 1) and slow decay."""
    make = torch.Generator().manual_seed(seed)
    keys = torch.stack([unit_keys(family, chunk_size, width, make) for _ in range(heads)])
    beta = torch.rand(heads, chunk_size, generator=make, dtype=torch.float64)
    g = -0.05 * torch.rand(heads, chunk_size, generator=make, dtype=torch.float64)
    return ut_system(keys, beta, g)
