"""Methods build plans. A new method is one builder function here, registered by name, and nothing else."""

from collections.abc import Callable

from ..plan import Plan
from .block_merge import block_merge
from .column_sweep import column_sweep
from .forward_substitution import forward_substitution
from .identity import identity
from .neumann import neumann, truncated_neumann
from .newton_schulz import newton_schulz
from .published import bunch_hopcroft, cayley_hamilton, mixed

METHODS: dict[str, Callable[..., Plan]] = {
    "block_merge": block_merge,
    "bunch_hopcroft": bunch_hopcroft,
    "cayley_hamilton": cayley_hamilton,
    "mixed": mixed,
    "neumann": neumann,
    "truncated_neumann": truncated_neumann,
    "newton_schulz": newton_schulz,
    "column_sweep": column_sweep,
    "forward_substitution": forward_substitution,
    "identity": identity,
}

__all__ = [
    "METHODS",
    "block_merge",
    "bunch_hopcroft",
    "cayley_hamilton",
    "column_sweep",
    "forward_substitution",
    "identity",
    "mixed",
    "neumann",
    "newton_schulz",
    "truncated_neumann",
]
