"""The gated delta rule: one dataflow over any arithmetic, its sites, and the recurrent reference."""

from .binding import Dimensions, LayerScheme, ScaleSpec, bind, make_scales, scale_shape, scale_specs
from .chunk import chunk_gated_delta_rule, run_rule
from .recurrent import recurrent_gated_delta_rule
from .sites import SITES, Site, rule_sites

__all__ = [
    "SITES",
    "Dimensions",
    "LayerScheme",
    "ScaleSpec",
    "Site",
    "bind",
    "chunk_gated_delta_rule",
    "make_scales",
    "recurrent_gated_delta_rule",
    "rule_sites",
    "run_rule",
    "scale_shape",
    "scale_specs",
]
