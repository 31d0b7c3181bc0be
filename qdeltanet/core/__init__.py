"""Numerics: formats, granularity, quantize, requantize, exact accumulation, the arithmetics, the Backend protocol."""

from .accumulate import (
    COEFFICIENT_BITS,
    COEFFICIENT_MAX,
    FLOAT32_EXACT,
    FLOAT64_EXACT,
    INT32_LIMIT,
    check_bound,
    coefficient_bits,
    exact_matmul,
    product_bound,
)
from .arithmetic import Arithmetic, FloatArithmetic, ObservingArithmetic
from .backend import Backend, FloatContainers
from .errors import BindingError, NonFiniteError, QDeltaNetError, unknown
from .formats import IntFormat
from .granularity import TINY, Granularity, dynamic_scale, fit_scale, grouped
from .integer import IntegerArithmetic
from .metrics import relative_error, sqnr, sqnr_from_energy
from .operand import Operand, diagonal_blocks, repeat_heads, whole
from .quantize import (
    check_scale,
    coefficient_codes,
    dequantize,
    fake_quantize,
    power_of_two_ceil,
    quantize,
    round_half_even,
    saturate,
    straight_through,
)
from .requantize import MODES, Mode, Region, Result, Term, requantize, scaled_sum
from .scheme import ProjectionScheme, RuleScheme, ScaleSource, Side, SiteScheme, use_granularity, use_key

__all__ = [
    "COEFFICIENT_BITS",
    "COEFFICIENT_MAX",
    "FLOAT32_EXACT",
    "FLOAT64_EXACT",
    "INT32_LIMIT",
    "MODES",
    "TINY",
    "Arithmetic",
    "Backend",
    "BindingError",
    "FloatArithmetic",
    "FloatContainers",
    "Granularity",
    "IntFormat",
    "IntegerArithmetic",
    "Mode",
    "NonFiniteError",
    "ObservingArithmetic",
    "Operand",
    "ProjectionScheme",
    "QDeltaNetError",
    "Region",
    "Result",
    "RuleScheme",
    "ScaleSource",
    "Side",
    "SiteScheme",
    "Term",
    "check_bound",
    "check_scale",
    "coefficient_bits",
    "coefficient_codes",
    "dequantize",
    "diagonal_blocks",
    "dynamic_scale",
    "exact_matmul",
    "fake_quantize",
    "fit_scale",
    "grouped",
    "power_of_two_ceil",
    "product_bound",
    "quantize",
    "relative_error",
    "repeat_heads",
    "requantize",
    "round_half_even",
    "saturate",
    "scaled_sum",
    "sqnr",
    "sqnr_from_energy",
    "straight_through",
    "unknown",
    "use_granularity",
    "use_key",
    "whole",
]
