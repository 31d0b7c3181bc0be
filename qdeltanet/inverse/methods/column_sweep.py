"""Column sweep: one elementary matrix after the other."""

from __future__ import annotations

from typing import Literal

from ..mask import Mask
from ..plan import INPUT, OUTPUT, Plan, Step, Unit
from .checks import check_choice

FORMS = ("vector", "matrix")


def column_sweep(chunk_size: int, form: Literal["vector", "matrix"] = "vector") -> Plan:
    """Column sweep: I + L <- (I + a_k e_k^T)(I + L), one column of A after the other.

    With a_k the column k of A, I - A = (I - a_0 e_0^T)(I - a_1 e_1^T)..., and the inverse of each factor has the sign
    turned: L <- L + a_k e_k^T (I + L) for k = 0 .. n - 2, exactly (VCS and MCS of arXiv 2605.21325). Every L is the
    inverse of A cut off after column k, so it stays within max(beta).

    n - 2 products of rank one, as many deep: the first factor is there already, where the paper's MCS counts n - 1.

    form: `vector` for a vector unit (VCS; no matrix products), `matrix` for full products (MCS). Raises QDeltaNetError
    for another form.
    """
    check_choice("column_sweep", "form", form, FORMS)
    unit: Unit = "vector" if form == "vector" else "matrix"
    steps: list[Step] = []
    for k in range(chunk_size - 1):
        last = k == chunk_size - 2
        steps.append(Step(OUTPUT if last and k == 0 else f"a{k}", Mask(1, chunk_size, column=k), INPUT))
        if k > 0:
            before = "a0" if k == 1 else "L"  # a copy of A, with A's scale
            addends = ((f"a{k}", 1), (before, 1))
            steps.append(Step(OUTPUT if last else "L", Mask(1, chunk_size), f"a{k}", before, addends, unit=unit))
    return Plan("column_sweep", chunk_size, tuple(steps), {"form": form}, frozenset((INPUT, "L", OUTPUT)))
