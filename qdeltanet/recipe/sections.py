"""The sections of a recipe as they stand in YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ..core import ROTATIONS, Granularity, IntFormat, ProjectionScheme, SiteScheme, unknown
from ..inverse import METHODS, Plan, plan

VERSION = 1
ROLES = ("proj.qkv", "proj.z", "proj.out", "proj.a", "proj.b", "conv")
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
    """Which observer proposes static ranges: the maximum, a percentile of |x| over everything that one scale covers, or
    the range of least mean square error in the site's format."""

    kind: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = Field(default=99.99, gt=0, le=100)


class SiteConfig(Strict):
    """One line of `sites`: what is not given is inherited from an earlier pattern."""

    format: str | None = None
    scale: Source | None = None
    granularity: Kept | None = None
    carry: str | None = None
    observer: ObserverConfig | None = None

    _formats = field_validator("format", "carry")(_check_format)


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
    """INT weights per output channel and integer activations."""

    weight: str = "int8"
    activation: str = "int8"
    scale: Literal["dynamic", "calibrated"] = "dynamic"

    _formats = field_validator("weight", "activation")(_check_format)

    def scheme(self) -> ProjectionScheme:
        kept = Granularity.PER_TOKEN if self.scale == "dynamic" else Granularity.PER_TENSOR
        return ProjectionScheme(
            IntFormat.parse(self.weight), SiteScheme(IntFormat.parse(self.activation), self.scale, kept)
        )


class LayerConfig(Strict):
    """Overrides for some layers: only what differs from the recipe. Keys as in the recipe itself."""

    chunk_size: int | None = None
    rotate: Rotations | None = None
    sites: dict[str, SiteConfig] = {}
    inverse: dict[str, Any] = {}
    projections: dict[str, ProjectionConfig | None] = {}
