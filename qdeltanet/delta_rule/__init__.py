"""The gated delta rule: one dataflow over any arithmetic, its sites, and the recurrent reference."""

from .binding import Dimensions, LayerScheme, ScaleSpec, bind, make_scales, scale_shape, scale_specs
from .chunk import chunk_gated_delta_rule, run_front, run_rule
from .cost import RuleCost, rule_cost
from .front import Front, prepare
from .recurrent import recurrent_gated_delta_rule
from .sites import SITES, Site, rule_sites

__all__ = [
    "SITES",
    "Dimensions",
    "Front",
    "LayerScheme",
    "RuleCost",
    "ScaleSpec",
    "Site",
    "bind",
    "chunk_gated_delta_rule",
    "make_scales",
    "prepare",
    "recurrent_gated_delta_rule",
    "rule_cost",
    "rule_sites",
    "run_front",
    "run_rule",
    "scale_shape",
    "scale_specs",
]
