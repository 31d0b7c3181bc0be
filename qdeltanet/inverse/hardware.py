"""A machine in a dozen numbers, and the prices of products, uses and stores on it.

Times are nanoseconds of one core: one matrix unit with the vector units that serve it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from ..core import QDeltaNetError, SiteScheme, unknown

UNITS = ("int4", "int8", "int16", "float")
ACCUMULATOR_BYTES = 4
# Vector operations for one element, as docs/integers.md defines the work; each is one pass of 4-byte lanes.
REQUANTIZE = 4  # scale, round, clamp, narrow
ADDEND = 2  # widen, multiply-add
AMAX = 2  # magnitude, maximum
COMBINE = 2  # shift and add one accumulator of a product of bytes
FLOAT_STORE = 1  # narrow
FLOAT_ADDEND = 1


@dataclass(frozen=True)
class Profile:
    """One core of a machine.

    tile: edge of the tiles that the matrix unit multiplies; nothing smaller is skipped. float_bytes: width of the
    machine's own float format, 2 for float16. macs_per_ns: rate of the matrix unit by operand format; int8 and float
    are always there, int4 and int16 where the unit takes them (else INT4 counts as INT8, and INT16 as the products of
    its bytes). product_latency: ns from issuing a matrix product to its accumulators at the vector unit;
    vector_latency: ns of one dependent pass of the vector unit. vector_bytes_per_ns: width of all lanes together.
    onchip_bytes_per_ns: between matrix and vector unit; offchip_bytes_per_ns: a core's share of main memory.
    concurrency: independent heads and chunks in flight on the core. sources: where each number is from, by field.

    Raises QDeltaNetError that names the field for a number that is missing or not positive.
    """

    name: str
    tile: int
    float_bytes: int
    macs_per_ns: Mapping[str, float]
    product_latency: float
    vector_latency: float
    vector_bytes_per_ns: float
    onchip_bytes_per_ns: float
    offchip_bytes_per_ns: float
    concurrency: float
    description: str = field(default="", compare=False)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for unit in self.macs_per_ns:
            if unit not in UNITS:
                raise unknown("operand format of macs_per_ns", unit, UNITS)
        for unit in ("int8", "float"):
            if unit not in self.macs_per_ns:
                raise QDeltaNetError(f"profile {self.name}: macs_per_ns.{unit} is missing; every profile needs it")
        numbers = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "description", "sources")
        }
        numbers |= {f"macs_per_ns.{unit}": rate for unit, rate in numbers.pop("macs_per_ns").items()}
        for name, number in numbers.items():
            if not (math.isfinite(number) and number > 0):
                raise QDeltaNetError(f"profile {self.name}: {name} = {number:g}; it must be a positive number")
        for name in ("tile", "float_bytes"):
            if numbers[name] != int(numbers[name]):
                raise QDeltaNetError(f"profile {self.name}: {name} = {numbers[name]:g}; it must be a whole number")

    def bytes_of(self, bits: int | None) -> float:
        """Bytes of one element; bits None for floats. INT4 packs two where the unit takes it."""
        if bits is None:
            return float(self.float_bytes)
        if bits <= 4 and "int4" in self.macs_per_ns:
            return 0.5
        return 1.0 if bits <= 8 else 2.0

    def unit_of(self, left: int | None, right: int | None) -> tuple[str, int]:
        """Which rate a product of two formats runs at, and how many products of that kind it takes."""
        if left is None or right is None:
            return "float", 1
        wide = max(left, right)
        if wide <= 4 and "int4" in self.macs_per_ns:
            return "int4", 1
        if wide <= 8:
            return "int8", 1
        if "int16" in self.macs_per_ns:
            return "int16", 1
        return "int8", math.ceil(left / 8) * math.ceil(right / 8)

    def vector_ns(self, operations: float, width: int = 4) -> float:
        """operations: of one element each; width: bytes of a lane."""
        return operations * width / self.vector_bytes_per_ns


@dataclass(frozen=True)
class Cost:
    """ns. matrix, vector, memory: how long the work keeps each busy; latency: what waiting adds per matrix.

    steps: the same of each step of a plan, by register, with the step's own latency.
    """

    matrix: float = 0.0
    vector: float = 0.0
    latency: float = 0.0
    memory: float = 0.0
    steps: tuple[tuple[str, Cost], ...] = field(default=(), compare=False, repr=False)

    @property
    def total(self) -> float:
        """The sum. Of what one head's dependent steps do nothing overlaps, so its work adds up; other heads and chunks
        fill the waits, so latency is divided by the concurrency before it is added. That is at most four times any
        schedule's lower bound, the largest of the four, and it falls with everything that a plan saves, so that two
        plans tie only if they are equal. The rule is the same for every method and machine."""
        return self.matrix + self.vector + self.latency + self.memory

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.matrix + other.matrix,
            self.vector + other.vector,
            self.latency + other.latency,
            self.memory + other.memory,
        )

    def scaled(self, factor: float) -> Cost:
        return Cost(factor * self.matrix, factor * self.vector, factor * self.latency, factor * self.memory)


def total_of(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def product(
    profile: Profile, left: SiteScheme, right: SiteScheme, macs: float, elements: tuple[float, float, float]
) -> Cost:
    """A product on the matrix unit. elements: read on the left, on the right, and accumulators handed over."""
    bits = _bits(left), _bits(right)
    unit, passes = profile.unit_of(*bits)
    read = sum(n * profile.bytes_of(b) for n, b in zip(elements, bits, strict=False))
    written = elements[2] * ACCUMULATOR_BYTES * passes
    return Cost(
        matrix=passes * macs / profile.macs_per_ns[unit],
        vector=profile.vector_ns(COMBINE * (passes - 1) * elements[2]),
        memory=(read + written) / profile.onchip_bytes_per_ns,
    )


def vector_product(profile: Profile, left: SiteScheme, right: SiteScheme, macs: float) -> Cost:
    """A product of rank one or of a row: a multiply-add per element on the vector unit, whose registers hold it."""
    floats = None in (_bits(left), _bits(right))
    return Cost(vector=profile.vector_ns(macs, profile.float_bytes if floats else 4))


def use(profile: Profile, scheme: SiteScheme, elements: float) -> Cost:
    """Operand codes of a carried tensor; any other is taken as it is."""
    if not _is_carried(scheme):
        return Cost()
    operations = REQUANTIZE + (AMAX if scheme.scale == "dynamic" else 0)
    moved = elements * (profile.bytes_of(_held(scheme)) + profile.bytes_of(_bits(scheme)))
    return Cost(vector=profile.vector_ns(operations * elements), memory=moved / profile.onchip_bytes_per_ns)


def store(
    profile: Profile, scheme: SiteScheme, elements: float, addends: Iterable[tuple[SiteScheme, float]] = ()
) -> Cost:
    """A sum of terms into a site: requantization of what is stored; addends (scheme, elements) are reads."""
    addends = list(addends)
    held = _held(scheme)
    read = sum(n * profile.bytes_of(_held(s)) for s, n in addends)
    added = sum(n for _, n in addends)
    if held is None:
        vector = profile.vector_ns(FLOAT_STORE * elements + FLOAT_ADDEND * added, profile.float_bytes)
    else:
        operations = REQUANTIZE + (AMAX if scheme.scale == "dynamic" else 0)
        vector = profile.vector_ns(operations * elements + ADDEND * added)
    return Cost(vector=vector, memory=(read + elements * profile.bytes_of(held)) / profile.onchip_bytes_per_ns)


def store_latency(profile: Profile, scheme: SiteScheme) -> float:
    """Beside the pass that a product or sum waits for anyway: a maximum has to be known before it divides."""
    return profile.vector_latency if scheme.scale == "dynamic" and scheme.held is not None else 0.0


def use_latency(profile: Profile, scheme: SiteScheme) -> float:
    if not _is_carried(scheme):
        return 0.0
    return profile.vector_latency * (2 if scheme.scale == "dynamic" else 1)


def _bits(scheme: SiteScheme) -> int | None:
    return None if scheme.format is None else scheme.format.bits


def _held(scheme: SiteScheme) -> int | None:
    return None if scheme.held is None else scheme.held.bits


def _is_carried(scheme: SiteScheme) -> bool:
    return scheme.carry is not None and scheme.format is not None
