"""The triangular inverse as plans: one plan, many readers."""

from .build import CHUNK_SIZES, method_options, plan
from .methods import METHODS
from .plan import INPUT, OUTPUT, Mask, Plan, Step
from .run import invert, register_ranges, run_plan, run_steps, site_of

__all__ = [
    "CHUNK_SIZES",
    "INPUT",
    "METHODS",
    "OUTPUT",
    "Mask",
    "Plan",
    "Step",
    "invert",
    "method_options",
    "plan",
    "register_ranges",
    "run_plan",
    "run_steps",
    "site_of",
]
