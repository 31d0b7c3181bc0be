"""What a plan costs on a machine: the same rules for every method.

Tiles that cannot be non-zero are skipped (`tiles`), every stored tile is requantized, every dependent step waits, every
tensor moves in the format it is held in. Copies are free: they hand codes on.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core import QDeltaNetError, SiteScheme
from .geometry import StepGeometry, geometry
from .hardware import Cost, Profile, product, store, store_latency, total_of, use, use_latency, vector_product
from .mask import Mask
from .plan import IDENTITY, INPUT, OUTPUT, Plan, Step, constant_masks
from .steps import site_of
from .tiles import StepTiles, step_tiles


def plan_cost(plan: Plan, schemes: Mapping[str, SiteScheme], profile: Profile) -> Cost:
    """Cost of one matrix, i.e. one head and chunk, A being there and T being left on the chip; by step as well.

    schemes: by site (A, T, `inverse.<register>`), as `RuleScheme.sites` has them; without a format in floating point.
    Raises QDeltaNetError for a register without a scheme.
    """
    reader = _Reader(plan, schemes, profile)
    masks = constant_masks(plan.chunk_size)
    tiles = step_tiles(plan, profile.tile)
    steps = []
    for step, where, touched in zip(plan.steps, geometry(plan), tiles, strict=True):
        steps.append((step.out, reader.step(step, where, touched, masks)))
        masks[step.out] = step.mask
    busy = total_of(cost for _, cost in steps)
    waits = [cost.latency for _, cost in steps]
    latency = critical_path(plan, waits) / profile.concurrency
    return Cost(busy.matrix, busy.vector, latency, busy.memory, tuple(steps))


def critical_path(plan: Plan, waits: list[float]) -> float:
    """The longest chain of dependent steps, each with its wait."""
    ready: dict[str, float] = {INPUT: 0.0, IDENTITY: 0.0}
    for step, wait in zip(plan.steps, waits, strict=True):
        sources = [step.left, *([step.right] if step.right else []), *(r for r, _ in step.addends)]
        ready[step.out] = max(ready[r] for r in sources) + wait
    return ready.get(OUTPUT, 0.0)


class _Reader:
    """The prices of a plan's steps."""

    def __init__(self, plan: Plan, schemes: Mapping[str, SiteScheme], profile: Profile) -> None:
        self.schemes = schemes
        self.profile = profile
        self.area = profile.tile**2
        self.source = {r: r for r in (INPUT, OUTPUT, *plan.registers)}
        for step in plan.steps:
            if step.is_copy:
                self.source.setdefault(step.out, self.source[step.left])

    def scheme(self, register: str) -> SiteScheme:
        """Of a register; a copy has its source's."""
        site = site_of(self.source[register])
        if site not in self.schemes:
            raise QDeltaNetError(f"site {site} has no scheme; a cost needs one for each register of the plan")
        return self.schemes[site]

    def step(self, step: Step, where: StepGeometry | None, tiles: StepTiles, masks: Mapping[str, Mask]) -> Cost:
        if where is None and step.out != OUTPUT:
            return Cost()
        if step.unit == "vector" and where is not None and step.right is not None:
            return self._on_vectors(step, where, masks)
        out, profile = self.scheme(step.out), self.profile
        summands = [step.left] if step.is_copy else [r for r, _ in step.summands]
        addends = [(self.scheme(r), self.area * n) for r, n in zip(summands, tiles.addends, strict=True) if n]
        cost = store(profile, out, self.area * tiles.stored, addends)
        wait = store_latency(profile, out)
        if step.right is None:
            return _waiting(cost, wait + profile.vector_latency)
        left, right = self.scheme(step.left), self.scheme(step.right)
        elements = tuple(self.area * n for n in (tiles.left, tiles.right, tiles.accumulators))
        cost += use(profile, left, elements[0]) + use(profile, right, elements[1])
        # of a band only the tiles that are kept leave the matrix unit
        handed = (elements[0], elements[1], min(elements[2], self.area * tiles.stored))
        cost += product(profile, left, right, tiles.products * self.area * profile.tile, handed)
        return _waiting(cost, wait + profile.product_latency + self._use_wait(left, right))

    def _on_vectors(self, step: Step, where: StepGeometry, masks: Mapping[str, Mask]) -> Cost:
        """Rows that the register already holds come out the same, and are not made again."""
        assert step.right is not None
        rows, inner = (_length(axis) for axis in where.left)
        done = masks[step.right].rows
        if step.mask.outer == masks[step.right].outer and done is not None:
            rows = max(0, where.left[0].stop - max(done, where.left[0].start))
        columns = _length(where.right[1])
        out, left, right = (self.scheme(r) for r in (step.out, step.left, step.right))
        blocks = masks[INPUT].outer // step.mask.outer
        stored = blocks * rows * columns
        addends = [(self.scheme(r), stored) for r, _ in step.addends if r != IDENTITY]
        cost = store(self.profile, out, stored, addends)
        cost += use(self.profile, left, blocks * rows * inner) + use(self.profile, right, blocks * inner * columns)
        cost += vector_product(self.profile, left, right, blocks * rows * inner * columns)
        wait = store_latency(self.profile, out) + self._use_wait(left, right)
        return _waiting(cost, wait + self.profile.vector_latency)

    def _use_wait(self, left: SiteScheme, right: SiteScheme) -> float:
        """Both operands are made ready side by side."""
        return max(use_latency(self.profile, left), use_latency(self.profile, right))


def _waiting(cost: Cost, latency: float) -> Cost:
    return Cost(cost.matrix, cost.vector, latency, cost.memory)


def _length(axis: slice) -> int:
    return axis.stop - axis.start
