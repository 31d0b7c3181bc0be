"""What one site asks for: bits, where its scale comes from, which axes the scale keeps, what it is carried in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .formats import IntFormat
from .granularity import Granularity
from .requantize import Mode

ScaleSource = Literal["calibrated", "bound", "dynamic"]
Side = Literal["left", "right"]
Decay = Literal["exp", "exp2"]
WeightMethod = Literal["rtn", "mse", "gptq"]
ROTATIONS = ("qk", "v")


@dataclass(frozen=True)
class SiteScheme:
    """Quantization of one named tensor.

    format: None leaves the site in floating point (fake execution only). scale: `calibrated` is static, from a
    calibration; `bound` is static, from a proven range (A, T and registers of the inverse); `dynamic` is computed from
    the tensor itself. granularity: the axes the scale keeps. carry: a wider format in which the tensor is held, with
    requantization to `format` at each use as an operand; None where the operand's codes are all there is. feedback: of
    the state only, the format of residual codes that travel beside its codes, with step scale * 2^-bits: what rounding
    lost, put back into the next state. Products read the codes alone.
    """

    format: IntFormat | None
    scale: ScaleSource = "calibrated"
    granularity: Granularity = Granularity.PER_HEAD
    carry: IntFormat | None = None
    feedback: IntFormat | None = None

    @property
    def held(self) -> IntFormat | None:
        """The format the tensor is held in between its uses."""
        return self.carry or self.format

    @property
    def held_granularity(self) -> Granularity:
        """A carried tensor has one scale per matrix; the axes of `granularity` come with each use."""
        if self.carry is None or self.granularity is Granularity.PER_TENSOR:
            return self.granularity
        return Granularity.PER_HEAD


def use_granularity(scheme: SiteScheme, side: Side) -> Granularity:
    """Granularity of a carried tensor's operand codes: finest keeps what the product does not contract."""
    if scheme.granularity is Granularity.FINEST:
        return Granularity.PER_TOKEN if side == "left" else Granularity.PER_CHANNEL
    return scheme.granularity


def use_key(site: str, side: Side) -> str:
    """Name of the scale of a carried site's operand codes on one side of a product."""
    return f"{site}/{side}"


@dataclass(frozen=True)
class RuleScheme:
    """Everything the arithmetic of one layer's rule needs beside scales.

    sites: every site of the table and every register of the plan (`inverse.<register>`). accumulator_bits: of the
    hardware; with 32, wide formats are multiplied byte by byte. decay: float32 exp, or core's integer exp2. rotate:
    which of ROTATIONS the front end turns by a Hadamard matrix: q and k over K, v over V.
    """

    sites: Mapping[str, SiteScheme]
    requantize: Mode = "float"
    accumulator_bits: int = 64
    decay: Decay = "exp"
    rotate: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ProjectionScheme:
    """Integer execution of one projection.

    weight: format of the weight codes. activation: `dynamic` per_token, or `calibrated` per_tensor; with format None
    the weights alone are integers. group: input channels that share a scale, for each output channel; None: all of
    them. method: how a weight becomes a code, given the others: to nearest at the range of its group (`rtn`), or at the
    clip of least square error (`mse`), or so that the outputs for the calibration data change least (`gptq`).
    """

    weight: IntFormat
    activation: SiteScheme
    group: int | None = None
    method: WeightMethod = "rtn"
