"""The sections of a recipe as they stand in YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ..core import ROTATIONS, Granularity, IntFormat, ProjectionScheme, QDeltaNetError, SiteScheme, unknown
from ..inverse import METHODS, Plan, plan

VERSION = 1
ROLES = (
    "proj.qkv",
    "proj.z",
    "proj.out",
    "proj.a",
    "proj.b",
    "conv",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
Source = Literal["calibrated", "dynamic", "bound"]
Kept = Literal["per_tensor", "per_head", "per_token", "per_channel", "finest"]
OPTIONS = (
    "radices",
    "join",
    "diagonal",
    "leaf",
    "order",
    "band",
    "residual_steps",
    "residual_sum",
    "block",
    "iterations",
    "start",
    "form",
)


class Strict(BaseModel):
    """Extra keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_format(name: str | None) -> str | None:
    if name not in (None, "float"):
        IntFormat.parse(str(name))
    return name


def _check_rotations(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in ROTATIONS:
            raise unknown("rotation", name, ROTATIONS)
    return tuple(r for r in ROTATIONS if r in names)


Rotations = Annotated[tuple[str, ...], AfterValidator(_check_rotations)]


class ObserverConfig(Strict):
    """Which observer proposes static ranges: the maximum, a percentile of |x| over all that one scale covers, the range
    of least mean square error in the site's format, or that of least Kullback-Leibler divergence."""

    kind: Literal["minmax", "percentile", "mse", "kl"] = "minmax"
    percentile: float = Field(default=99.99, gt=0, le=100)


class SiteConfig(Strict):
    """One line of `sites`: what is not given is inherited from an earlier pattern."""

    format: str | None = None
    scale: Source | None = None
    granularity: Kept | None = None
    carry: str | None = None
    feedback: str | None = None
    observer: ObserverConfig | None = None

    _formats = field_validator("format", "carry", "feedback")(_check_format)


class InverseConfig(Strict):
    """The inverse's method with its options, and how its registers are held."""

    method: str = "block_merge"
    radices: tuple[int, ...] | None = None
    join: str | None = None
    diagonal: str | None = None
    leaf: int | None = None
    order: int | None = None
    band: int | Literal["none"] | None = None
    residual_steps: int | None = None
    residual_sum: str | None = None
    block: int | None = None
    iterations: int | None = None
    start: str | None = None
    form: str | None = None
    format: str = "int8"
    scale: Source = "calibrated"
    granularity: Kept = "per_head"
    carry: str | None = None
    rescale: Literal["per_register", "shared"] = "per_register"
    headroom: float = Field(default=1.0, ge=1, le=16)

    _formats = field_validator("format", "carry")(_check_format)

    @model_validator(mode="after")
    def _known_method(self) -> InverseConfig:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        return self

    def plan(self, chunk_size: int) -> Plan:
        """Options of another method than the chosen one are refused."""
        return plan(self.method, chunk_size, **{k: getattr(self, k) for k in OPTIONS})


class ProjectionConfig(Strict):
    """Integer weights with a scale per output channel, or per `group` input channels of each; activations in integers
    too, or in float."""

    weight: str = "int8"
    activation: str = "int8"
    scale: Literal["dynamic", "calibrated"] = "dynamic"
    group: int | None = Field(default=None, ge=1)
    method: Literal["rtn", "mse", "gptq"] = "rtn"

    _formats = field_validator("weight", "activation")(_check_format)

    @model_validator(mode="after")
    def _fits(self) -> ProjectionConfig:
        if self.weight == "float":
            raise QDeltaNetError("a projection whose weight is float is not quantized: write null in its place")
        if self.activation == "float" and self.scale == "calibrated":
            raise QDeltaNetError("activation: float has no scale to calibrate; leave scale out")
        return self

    def scheme(self) -> ProjectionScheme:
        kept = Granularity.PER_TOKEN if self.scale == "dynamic" else Granularity.PER_TENSOR
        fmt = None if self.activation == "float" else IntFormat.parse(self.activation)
        return ProjectionScheme(
            IntFormat.parse(self.weight), SiteScheme(fmt, self.scale, kept), self.group, self.method
        )


class LayerConfig(Strict):
    """Overrides for some layers: only what differs from the recipe. Keys as in the recipe itself."""

    chunk_size: int | None = None
    rotate: Rotations | None = None
    sites: dict[str, SiteConfig] = {}
    inverse: dict[str, Any] = {}
    projections: dict[str, ProjectionConfig | None] = {}
