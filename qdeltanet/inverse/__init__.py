"""The triangular inverse as plans: one plan, many readers."""

from .build import CHUNK_SIZES, method_options, plan
from .cost import plan_cost
from .hardware import Cost, Profile
from .mask import Mask
from .methods import METHODS
from .plan import IDENTITY, INPUT, OUTPUT, Plan, Step
from .run import check_factors, invert, register_ranges, run_plan, run_steps, unfit_factor
from .speedups import PUBLISHED, fit_latency, predicted_speedup
from .steps import site_of
from .tiles import tile_products

__all__ = [
    "CHUNK_SIZES",
    "IDENTITY",
    "INPUT",
    "METHODS",
    "OUTPUT",
    "PUBLISHED",
    "Cost",
    "Mask",
    "Plan",
    "Profile",
    "Step",
    "check_factors",
    "fit_latency",
    "invert",
    "method_options",
    "plan",
    "plan_cost",
    "predicted_speedup",
    "register_ranges",
    "run_plan",
    "run_steps",
    "site_of",
    "tile_products",
    "unfit_factor",
]
