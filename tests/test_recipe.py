"""Recipes: what ships, overrides, and what bad input says."""

from __future__ import annotations

import pytest

from qdeltanet.core import Granularity, QDeltaNetError
from qdeltanet.delta_rule import SITES
from qdeltanet.recipe import load_recipe, parse_recipe, shipped_recipes

SHIPPED = {
    "float",
    "int8",
    "int8-decode",
    "int16",
    "int3",
    "int4",
    "int4-inverse",
    "int4-static",
    "neumann-int8",
    "neumann-int16",
    "w4a16",
    "w4a8",
    "w8a8",
}


def test_recipes_that_ship_bind():
    assert set(shipped_recipes()) == SHIPPED
    for name in SHIPPED - {"float"}:
        scheme = load_recipe(name).layer(0)
        assert set(SITES) <= set(scheme.bound(128).sites)
    assert load_recipe("float").is_float
    assert not load_recipe("int8").is_float


@pytest.mark.parametrize(
    "override",
    ["sites={'*': {format: int8}}", "inverse.format=int8", "projections={mlp.*: {weight: int8}}"],
)
def test_one_quantized_layer_is_enough_not_to_be_float(override):
    assert not load_recipe("float", [f"layers.1*.{override}"]).is_float
    assert not load_recipe("int8", ["layers.*.sites={'*': {format: float}}", f"layers.12.{override}"]).is_float


def test_resolved_yaml_is_the_same_recipe(tmp_path):
    for name in SHIPPED:
        recipe = load_recipe(name, ["layers.1.inverse.method=neumann"] if name == "int8" else [])
        path = tmp_path / f"{name}.yaml"
        path.write_text(recipe.to_yaml())
        assert load_recipe(path).fingerprint == recipe.fingerprint


def test_published_method():
    plan = load_recipe("neumann-int8").layer(0).plan
    assert plan.method == "neumann"
    assert plan.options.items() >= {"order": 3, "band": 3, "residual_steps": 8, "residual_sum": "doubled"}.items()


def test_int4_is_finest_dynamic_and_carried():
    rule = load_recipe("int4").layer(0).bound(32)
    bound = rule.sites
    assert rule.rotate == {"qk"}
    assert bound["T"].granularity is Granularity.PER_TOKEN
    assert bound["v_new"].granularity is Granularity.PER_CHANNEL
    assert bound["state"].carry is not None
    assert all(s.carry is not None for name, s in bound.items() if name.startswith("inverse."))
    assert all(s.scale == "dynamic" and s.format is not None and s.format.bits == 4 for s in bound.values())


def test_overrides():
    recipe = load_recipe("int8", ["inverse.radices=[4, 4, 4]"])
    assert recipe.layer(0).plan.options["radices"] == (4, 4, 4)
    sites = load_recipe("int8", ["sites.inverse.L16.format=int4", "sites.q.format=int6"]).layer(0).bound(32).sites
    assert (sites["inverse.L16"].format.bits, sites["q"].format.bits, sites["k"].format.bits) == (4, 6, 8)


def test_name_does_not_change_the_fingerprint_but_values_do():
    recipe = load_recipe("int8")
    assert load_recipe("int8", ["name=other"]).fingerprint == recipe.fingerprint
    assert load_recipe("int8", ["chunk_size=32"]).fingerprint != recipe.fingerprint


def test_rotations_by_layer():
    recipe = load_recipe("int8", ["rotate=[v, qk]", "layers.2={rotate: []}", "layers.3={rotate: [v]}"])
    rotate = [recipe.layer(i).bound(32, 32).rotate for i in (1, 2, 3)]
    assert rotate == [{"qk", "v"}, set(), {"v"}]
    assert recipe.rotate == ("qk", "v")
    assert load_recipe("int8").layer(0).bound(24, 24).rotate == set()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("inverse.metod=neumann", "did you mean method"),
        ("inverse.method=neuman", "did you mean neumann"),
        ("inverse.residual_steps=4", "unknown option of block_merge 'residual_steps'; known: diagonal, join, radices"),
        ("sites.v_bet.format=int4", "did you mean v_beta"),
        ("sites.q.formt=int4", "did you mean format"),
        ("sites.q.format=int99", "bits must be in 2..16"),
        ("chunk_size=48", "power of two"),
        ("inverse.radices=[3,5]", "product is the chunk size 64"),
        ("version=2", "reads recipe version 1"),
        ("projections.proj.x.weight=int8", "unknown projection 'proj.x'"),
        ("projections.conv.weight=int8", "stays in float"),
        ("layers.zero.chunk_size=32", "must be a layer index"),
        ("nonsense", "write it as key=value"),
        ("observer.kind=mean", "observer.kind"),
        ("rotate=[kq]", "unknown rotation 'kq'; did you mean qk"),
    ],
)
def test_bad_overrides_name_the_thing(override, says):
    with pytest.raises(QDeltaNetError, match=says.replace("(", r"\(")):
        load_recipe("int8", [override])


def test_bad_files(tmp_path):
    with pytest.raises(QDeltaNetError, match="did you mean int8"):
        load_recipe("int88")
    broken = tmp_path / "broken.yaml"
    broken.write_text("sites: [")
    with pytest.raises(QDeltaNetError, match=r"broken.yaml: not YAML"):
        load_recipe(broken)
    with pytest.raises(QDeltaNetError, match="has no format"):
        parse_recipe({"version": 1, "sites": {"q": {"format": "int8"}}})


@pytest.mark.parametrize(
    ("override", "site", "field", "value"),
    [
        ("sites.k={observer: {kind: mse}}", "k", "observer.kind", "mse"),
        ("sites.k.observer.kind=kl", "k", "observer.kind", "kl"),
        ("sites.inverse.L16.format=int4", "inverse.L16", "format", "int4"),
        ("sites.inverse.L16={format: int4}", "inverse.L16", "format", "int4"),
        ("sites.inverse.*.observer.kind=minmax", "inverse.*", "observer.kind", "minmax"),
    ],
)
def test_overrides_know_where_the_name_of_a_site_ends(override, site, field, value):
    found = load_recipe("int8", [override]).sites[site].model_dump()
    for key in field.split("."):
        found = found[key]
    assert found == value


def test_a_projection_can_be_taken_back():
    assert load_recipe("w8a8", ["projections.proj.z=null"]).projections["proj.z"] is None
