"""The published speed-ups over forward substitution, and the one number that a profile takes from them.

arXiv 2606.06034 on Snapdragon 8 Elite Gen 5: the masked Neumann inverse with residual correction is 5.2 / 4.2 / 4.6
times as fast as forward substitution at chunks of 32 / 64 / 128 tokens. We compare, per matrix and with A and T on the
chip, its INT8 form with forward substitution in floats on the vector unit; at 128, two blocks of 64 and their join with
forward substitution over all 128 rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core import IntFormat, QDeltaNetError, SiteScheme
from .build import plan
from .cost import plan_cost
from .hardware import Profile
from .plan import INPUT, OUTPUT, Plan
from .steps import site_of

INT8 = SiteScheme(IntFormat(8))
FLOAT = SiteScheme(None)
FITTED_AT = 64


@dataclass(frozen=True)
class Published:
    """Order (and band) and residual terms used at a chunk size, and how much faster they were."""

    order: int
    residual_steps: int
    speedup: float

    @property
    def options(self) -> dict[str, int]:
        """For `plan("neumann", ...)`."""
        return {"order": self.order, "band": self.order, "residual_steps": self.residual_steps}


PUBLISHED = {32: Published(4, 3, 5.2), 64: Published(3, 8, 4.2), 128: Published(3, 8, 4.6)}


def alike(plan: Plan, scheme: SiteScheme) -> dict[str, SiteScheme]:
    """One scheme for A, T and every register."""
    return dict.fromkeys([INPUT, OUTPUT, *(site_of(r) for r in plan.registers)], scheme)


def predicted_speedup(chunk_size: int, profile: Profile, scheme: SiteScheme = INT8) -> float:
    """Cost of forward substitution in floats / cost of the published inverse, its registers held as `scheme` says."""
    slow, fast = _totals(chunk_size, profile, scheme)
    return slow / fast


def fit_latency(profile: Profile, scheme: SiteScheme = INT8) -> float:
    """The latency in ns, of a dependent matrix product and of a dependent vector pass alike, at which the speed-up at
    chunk 64 is the published one. One number, at one chunk size; all others stay as the profile has them.

    Both costs are linear in it: slow(x) = 4.2 fast(x). That both units wait equally long is assumed: either way a
    result goes through the same on-chip memory before the next step reads it.

    Raises QDeltaNetError where no positive latency gives that speed-up.
    """
    published = PUBLISHED[FITTED_AT].speedup
    excess = []
    for x in (1.0, 2.0):
        slow, fast = _totals(FITTED_AT, with_latency(profile, x), scheme)
        excess.append(slow - published * fast)
    slope = excess[1] - excess[0]
    latency = 1.0 - excess[0] / slope if slope else 0.0
    if latency <= 0:
        raise QDeltaNetError(
            f"profile {profile.name}: no latency gives a speed-up of {published} at chunk {FITTED_AT}; "
            "check its rates of matrix and vector unit"
        )
    return latency


def with_latency(profile: Profile, latency: float) -> Profile:
    return replace(profile, product_latency=latency, vector_latency=latency)


def _totals(chunk_size: int, profile: Profile, scheme: SiteScheme) -> tuple[float, float]:
    known = PUBLISHED.get(chunk_size)
    if known is None:
        sizes = ", ".join(map(str, PUBLISHED))
        raise QDeltaNetError(f"chunk size {chunk_size}: speed-ups are published for {sizes}")
    slow = plan("forward_substitution", chunk_size)
    fast = plan("neumann", chunk_size, **known.options)
    costs = (plan_cost(slow, alike(slow, FLOAT), profile), plan_cost(fast, alike(fast, scheme), profile))
    return costs[0].total, costs[1].total
