"""Families are what they say, and files are refused for what they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdeltanet.core import QDeltaNetError
from qdeltanet.delta_rule.laboratory import exact_inverse
from qdeltanet.inverse.families import (
    BETA_LARGE,
    BETA_SMALL,
    FAMILIES,
    LEVELS,
    UNIFORM,
    Shape,
    family,
    gates_large,
    gates_small,
    slow_gates,
)
from qdeltanet.inverse.family_files import check_matrices, gate_families, gates_in
from qdeltanet.inverse.points import points

EVERY = [*FAMILIES.values(), UNIFORM]
SMALL = Shape(heads=4, matrices=3, chunk_size=32)


@pytest.mark.parametrize("chosen", EVERY, ids=lambda f: f.name)
def test_matrices_are_strictly_lower_and_repeat_themselves(chosen) -> None:
    A = chosen.matrices(SMALL, seed=1)
    assert A.shape == (4, 3, 32, 32)
    assert A.dtype == torch.float64
    assert not A.triu().any()
    assert bool(A.isfinite().all())
    assert torch.equal(A, chosen.matrices(SMALL, seed=1))
    if chosen.name not in ("ones", "orthogonal"):
        assert not torch.equal(A, chosen.matrices(SMALL, seed=2))


@pytest.mark.parametrize("chosen", FAMILIES.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("chunk_size", [16, 128])
def test_entries_of_A_and_T_stay_within_max_beta(chosen, chunk_size: int) -> None:
    A = chosen.matrices(Shape(4, 4, chunk_size))
    limit = chosen.limit + 1e-12  # float64 rounding of A and of the solver
    assert float(A.abs().max()) <= limit
    assert float(exact_inverse(A).tril(-1).abs().max()) <= limit


def test_uniform_has_no_such_limit() -> None:
    assert UNIFORM.limit is None
    A = UNIFORM.matrices(Shape(2, 8, 64))
    below = -A[(..., *torch.tril_indices(64, 64, -1))]
    assert 0 <= float(below.min()) < 0.001
    assert 0.499 < float(below.max()) < 0.5
    assert float(exact_inverse(A).tril(-1).abs().max()) > 1


@pytest.mark.parametrize("chunk_size", [16, 128])
def test_ones_and_orthogonal_are_exact(chunk_size: int) -> None:
    shape = Shape(2, 2, chunk_size)
    assert torch.equal(FAMILIES["ones"].matrices(shape)[1, 1], -torch.ones(chunk_size, chunk_size).double().tril(-1))
    assert not FAMILIES["orthogonal"].matrices(shape).any()


@pytest.mark.parametrize(("gates", "quantiles"), [(gates_small, BETA_SMALL), (gates_large, BETA_LARGE)])
def test_beta_has_the_quantiles_of_real_models(gates, quantiles: tuple[float, ...]) -> None:
    beta, _ = gates(Shape(2000, 1, 64), torch.Generator().manual_seed(0))
    found = torch.quantile(beta.flatten(), torch.tensor(LEVELS, dtype=torch.float64))
    for x, wanted in zip(found.tolist(), quantiles, strict=True):
        assert x == pytest.approx(wanted, abs=0.02)  # of 2000 heads: the standard error of a quartile is below .01
    means = beta.mean((1, 2))
    assert float(means.std()) > 0.1  # heads differ


def test_decay_has_the_means_of_real_heads() -> None:
    shape = Shape(400, 8, 64)
    make = torch.Generator().manual_seed(0)
    slow = slow_gates(shape, make)[1].mean((1, 2))[0::4]
    assert float(slow.max()) <= -0.0003 * 0.8  # 512 lognormal samples: their mean is within a fifth
    assert float(slow.min()) >= -0.0032 * 1.2
    at_once = gates_large(shape, make)[1].mean((1, 2))[3::4]
    assert -166 * 1.2 <= float(at_once.min()) <= float(at_once.max()) <= -100


def test_a_wrong_name_is_one_line() -> None:
    assert family("uniform") is UNIFORM
    with pytest.raises(QDeltaNetError, match="unknown family 'corelated'; did you mean correlated"):
        family("corelated")


# -- files -------------------------------------------------------------------------------------------------------------

GOOD = torch.full((4, 4), -0.5).tril(-1)


def test_matrices_of_every_rank() -> None:
    for shape in ((4, 4), (3, 4, 4), (2, 3, 4, 4)):
        A = check_matrices(GOOD.expand(shape))
        assert A.dtype == torch.float64
        assert A.shape == (*([1] * (4 - len(shape))), *shape)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (GOOD + torch.eye(4), "x: its diagonal is not zero; give the strictly lower A"),
        (GOOD.T, "x: its upper triangle is not zero"),
        (GOOD * float("nan"), "x: holds NaN or infinity"),
        (torch.zeros(4, 8), "need floating point"),
        (torch.zeros(4), "need floating point"),
        (torch.zeros(4, 4, dtype=torch.int32), "int32: need floating point"),
        (torch.zeros(48, 48), "x: chunk size 48 is no power of two; pad with zero rows and columns"),
        (torch.zeros(0, 4, 4), "holds no matrix"),
    ],
)
def test_bad_matrices(A: Tensor, message: str) -> None:
    with pytest.raises(QDeltaNetError, match=message) as e:
        check_matrices(A, "x")
    assert "\n" not in str(e.value)


def recorded(tokens: int = 64, heads: int = 3, beta: float = 0.5) -> dict[str, Tensor]:
    ramp = torch.arange(tokens * heads).reshape(tokens, heads) / (tokens * heads)
    return {"m.beta": beta * ramp, "m.g": -ramp}


def test_recorded_gates_are_cut_into_chunks_of_their_heads() -> None:
    found = recorded()
    gates = gates_in(found, "f")["m"]
    beta, g = gates(Shape(6, 5, 16), torch.Generator().manual_seed(0))
    assert beta.shape == g.shape == (6, 5, 16)
    assert torch.equal(beta[0], beta[3])  # again and again
    chunks = found["m.beta"].double().T.unflatten(1, (4, 16))
    for h in range(3):
        for m in range(5):
            assert any(torch.equal(beta[h, m], chunks[h, n]) for n in range(4))
    assert torch.equal(g, -2 * beta)  # the same cut of both


def test_families_of_recorded_gates() -> None:
    made = {f.name: f for f in gate_families(recorded(), "f")}
    assert set(made) == {"m/iid", "m/silu", "m/correlated", "m/repeated"}
    assert made["m/iid"].limit == 1
    assert gate_families(recorded(beta=2.0), "f")[0].limit == 2
    assert not made["m/iid"].matrices(SMALL).triu().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.g": None}, "f: m.g is missing; gates come in pairs"),
        ({"m.beta": None, "m.g": None, "x": torch.zeros(1)}, "no <name>.beta with <name>.g; tensors are x"),
        ({"m.beta": torch.zeros(64, 2)}, "need .tokens, heads. twice"),
        ({"m.beta": torch.full((64, 3), 2.5)}, "need beta in"),
        ({"m.beta": torch.full((64, 3), float("nan"))}, "need beta in"),
        ({"m.g": torch.full((64, 3), 0.1)}, "g <= 0"),
        ({"m.g": torch.full((64, 3), -float("inf"))}, "finite g"),
    ],
)
def test_bad_gates(change: dict[str, Tensor | None], message: str) -> None:
    found = {k: x for k, x in (recorded() | change).items() if x is not None}
    with pytest.raises(QDeltaNetError, match=message) as e:
        gates_in(found, "f")
    assert "\n" not in str(e.value)


def test_too_few_tokens_for_a_chunk() -> None:
    gates = gates_in(recorded(tokens=8), "f")["m"]
    with pytest.raises(QDeltaNetError, match="8 tokens, fewer than a chunk of 16"):
        gates(Shape(1, 1, 16), torch.Generator())


def test_points_have_one_default_and_no_plan_twice() -> None:
    for chunk_size in (16, 32, 64, 128):
        found = points(chunk_size, ["block_merge", "neumann", "forward_substitution"])
        assert [p.default for p in found] == [True] + [False] * (len(found) - 1)
        assert len({p.plan.steps for p in found if p.method == "neumann"}) == sum(p.method == "neumann" for p in found)
    with pytest.raises(QDeltaNetError, match="must be a power of two"):
        points(48, ["block_merge"])
