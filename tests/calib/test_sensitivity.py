"""Each site alone, and observers by site."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qdeltanet.calib import MseObserver, Sensitivity, calibrate, make_observer, sensitivity
from qdeltanet.calib.data import Samples
from qdeltanet.calib.sensitivity import only
from qdeltanet.core import QDeltaNetError
from qdeltanet.delta_rule import SITES
from qdeltanet.models import delta_net_layers, set_execution
from qdeltanet.recipe import load_recipe, parse_recipe

TOKENS = torch.randint(0, 100, (4, 70), generator=torch.Generator().manual_seed(3))


def rows_of(model: object, recipe: str = "int4", *overrides: str, **options: object) -> dict[str, Sensitivity]:
    rows = sensitivity(model, load_recipe(recipe, overrides), TOKENS, **options)  # type: ignore[arg-type]
    assert [r.nll for r in rows[:-1]] == sorted((r.nll for r in rows[:-1]), reverse=True)
    return {r.site: r for r in rows}


@torch.no_grad()
def test_every_site_alone_and_all_at_once(random_model):
    model, ticks = random_model(), []
    rows = rows_of(model, progress=lambda *t: ticks.append(t))
    assert set(rows) == {*SITES, "inverse.*", "*"}
    assert ticks == [(i, len(SITES) + 2) for i in range(1, len(SITES) + 3)]
    assert all(r.sqnr_db > rows["*"].sqnr_db for s, r in rows.items() if s != "*")
    expected = random_model()(TOKENS).logits
    nll = F.cross_entropy(expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert rows["q"].float_nll == pytest.approx(float(nll), abs=1e-5)
    assert {layer.execution for layer in delta_net_layers(model).values()} == {"float"}
    # what it says of all sites is what the model does
    set_execution(model, "integer")
    found = model(TOKENS).logits
    assert rows["*"].sqnr_db == pytest.approx(
        float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum())), abs=0.01
    )


@torch.no_grad()
def test_only_counted_tokens_count(random_model):
    counted = torch.zeros_like(TOKENS, dtype=torch.bool)
    counted[:, [0, 40]] = True  # nothing predicts the first
    row = rows_of(random_model(), counted=counted, sites=["q"])["q"]
    expected = F.cross_entropy(random_model()(TOKENS).logits[:, 39], TOKENS[:, 40])
    assert row.float_nll == pytest.approx(float(expected), abs=1e-5)


def test_fewer_bits_cost_more_and_float_costs_nothing(random_model):
    quality = [
        rows_of(random_model(), "int4", f"sites.*.format=int{bits}", f"inverse.format=int{bits}", sites=["v_new", "T"])
        for bits in (3, 8)
    ]
    for site in ("v_new", "T"):
        assert quality[0][site].sqnr_db + 15 < quality[1][site].sqnr_db
    without = rows_of(random_model(), "int4", "sites.q.format=float", "rotate=[]", sites=["q"])["q"]
    assert without.sqnr_db > 100


def test_bad_requests(random_model):
    with pytest.raises(QDeltaNetError, match=r"tokens \[4, 1\]: must be \[N, T\]"):
        sensitivity(random_model(), load_recipe("int4"), TOKENS[:, :1])
    with pytest.raises(QDeltaNetError, match="count some token"):
        sensitivity(random_model(), load_recipe("int4"), TOKENS, counted=torch.zeros_like(TOKENS, dtype=torch.bool))
    with pytest.raises(QDeltaNetError, match="leaves the rule in float"):
        sensitivity(random_model(), load_recipe("float"), TOKENS)
    model = random_model()
    with pytest.raises(QDeltaNetError, match="site v_bet: the recipe has no such site"):
        sensitivity(model, load_recipe("int4"), TOKENS, sites=["v_bet"])
    layer = next(iter(delta_net_layers(model).values()))
    assert all(s.format is not None for s in layer.bound.sites.values())  # the schemes are put back
    assert only(layer.bound, "inverse.*").sites["A"].format is None


# -- observers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qmax", [1, 3, 7, 127])
def test_mse_range_is_the_best_of_a_fine_grid(qmax):
    x = torch.randn(4, 2, 1, 1, 4000, generator=torch.Generator().manual_seed(qmax)) * torch.tensor([1.0, 50.0]).view(
        1, 2, 1, 1, 1
    )
    observer = MseObserver(qmax)
    for part in x.split(1):
        observer.update(part)

    def error(head: int, amax: float) -> float:
        scale = amax / qmax
        values = x[:, head].flatten()
        return float((values - (values / scale).round().clamp(-qmax, qmax) * scale).square().mean())

    for head in range(2):
        top = float(x[:, head].abs().max())
        least = min(error(head, top * r) for r in torch.linspace(0.1, 1, 200).tolist())
        assert error(head, float(observer.amax()[head])) < 1.03 * least


def test_mse_keeps_what_codes_hold_exactly_and_does_not_depend_on_batches():
    levels = torch.arange(-7.0, 8.0).repeat(4).view(4, 1, 1, 1, 15)
    whole, parts = MseObserver(7), MseObserver(7)
    whole.update(levels)
    for part in levels.split(1):
        parts.update(part)
    assert torch.equal(whole.amax(), parts.amax())
    assert float(whole.amax()) == pytest.approx(7, rel=0.03)
    assert isinstance(make_observer("mse", 99.0, 7), MseObserver)
    zero = MseObserver(7)
    zero.update(torch.zeros(1, 2, 1, 1, 3))
    assert zero.amax().tolist() == [[[0.0]]] * 2


def test_observers_by_site(random_model):
    recipe = load_recipe("int8", ["observer.kind=mse", "sites.k={observer: {kind: minmax}}"])
    chosen = recipe.observers(0)
    register = next(s for s in chosen if s.startswith("inverse."))
    assert (chosen["k"].kind, chosen["q"].kind, chosen[register].kind) == ("minmax", "mse", "mse")
    per_layer = parse_recipe(
        {"sites": {"*": {"format": "int4"}}, "layers": {"2": {"sites": {"inverse.*": {"observer": {"kind": "mse"}}}}}}
    )
    assert [per_layer.observers(i)[register].kind for i in (1, 2)] == ["minmax", "mse"]
    assert per_layer.observers(2)["T"].kind == "minmax"
    samples = Samples("random", TOKENS, "digest")
    plain = calibrate(random_model(), load_recipe("int4-static", ["observer.kind=minmax"]), samples).scales
    best = calibrate(random_model(), load_recipe("int4-static"), samples).scales
    assert all(bool((best[key] <= plain[key]).all()) for key in plain)
    same = {key.split(".", 2)[2].split("/")[0] for key in plain if torch.equal(plain[key], best[key])}
    assert {"A", "T", *(s for s in load_recipe("int4-static").observers(0) if s.startswith("inverse."))} <= same
    assert not {"q", "v_new", "v_beta"} & same


@torch.no_grad()
def test_calibration_sees_the_rotated_basis_and_integers_equal_the_reference(random_model):
    model = random_model()
    samples = Samples("random", TOKENS, "digest")
    scales = calibrate(model, load_recipe("int8", ["rotate=[qk, v]"]), samples).scales
    plain = calibrate(random_model(), load_recipe("int8"), samples).scales
    changed = {key for key in scales if not torch.allclose(scales[key], plain[key], rtol=1e-3)}
    assert {f"layers.0.{s}" for s in ("q", "k", "v_beta", "state")} <= changed
    assert not {"layers.0.A", "layers.0.attn", "layers.0.T"} & changed
    set_execution(model, "integer")
    logits = model(TOKENS).logits
    set_execution(model, "integer", "reference")
    assert torch.equal(model(TOKENS).logits, logits)
