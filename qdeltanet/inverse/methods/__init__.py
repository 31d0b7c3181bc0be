"""Methods build plans. A new method is one builder function here, registered by name, and nothing else."""

from collections.abc import Callable

from ..plan import Plan
from .block_merge import block_merge
from .forward_substitution import forward_substitution
from .identity import identity
from .neumann import neumann

METHODS: dict[str, Callable[..., Plan]] = {
    "block_merge": block_merge,
    "neumann": neumann,
    "forward_substitution": forward_substitution,
    "identity": identity,
}

__all__ = ["METHODS", "block_merge", "forward_substitution", "identity", "neumann"]
