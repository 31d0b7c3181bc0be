"""The search: what it chooses from, how it chooses, and that it goes on where it was cut off."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import child, ended, limited, said_by_child

from qdeltanet._threads import threads
from qdeltanet.calib import load_samples
from qdeltanet.calib.data import Samples
from qdeltanet.calib.search import Harness, Journal, Loss, Settings, adapt_neumann, search, search_to
from qdeltanet.calib.search.candidates import BASE, NARROWED, Candidate, candidates, compositions, overridden, override
from qdeltanet.calib.search.choose import Option, choose, least_loss, pareto, spread
from qdeltanet.calib.search.harness import _compared
from qdeltanet.calib.search.matrices import Systems
from qdeltanet.calib.search.prices import Prices
from qdeltanet.calib.search.report import content, picture
from qdeltanet.calib.search.run import Found, Point
from qdeltanet.core import QDeltaNetError
from qdeltanet.delta_rule import Dimensions, rule_cost
from qdeltanet.eval.embedded import DATASETS, model_path
from qdeltanet.inverse import plan
from qdeltanet.inverse.families import Shape, family
from qdeltanet.models import load_model, load_tokenizer
from qdeltanet.profile import load_profile
from qdeltanet.recipe import load_recipe

DIMS = Dimensions(2, 4, 32, 32, 4)
PROFILE = load_profile("ascend-910b")
QUICK = Settings(("truncated_neumann", "identity"), ("int8",), error=1.0, keep=3, matrices=4)
LOOSE = 5.0  # nats: everything fits


def rule_price(scheme: Any, dims: Dimensions) -> float:
    return rule_cost(scheme, dims, PROFILE).per_token.total


def price(scheme: Any, dims: Dimensions) -> float:
    """Depth and bits, for searches that are to be quick."""
    return 10 * scheme.plan.depth + sum(s.format.bits for s in scheme.rule.sites.values())


@pytest.fixture(scope="module")
def samples() -> Samples:
    return load_samples(DATASETS["recall"], load_tokenizer(model_path("tiny-recall")), 6, 128)


def tiny() -> Any:
    return load_model(model_path("tiny-recall"))


def harness(samples: Samples) -> Harness:
    return Harness(tiny(), load_recipe("int8"), samples, 8)


# -- what there is to choose from --------------------------------------------------------------------------------------


def test_compositions():
    assert sorted(compositions(3)) == [(1, 1, 1), (1, 2), (2, 1), (3,)]
    assert len(set(compositions(6))) == 32


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
def test_candidates_are_different_programs(chunk_size):
    found = candidates(chunk_size)
    assert found[0] == Candidate(BASE)
    assert len({c.name for c in found}) == len(found) > 100
    built = [load_recipe("int8", [f"chunk_size={chunk_size}"])]
    for candidate in found[1::9]:
        recipe = overridden(built[0], {"0": override(candidate)})
        scheme = recipe.layer(0)
        assert scheme.plan.method == candidate.inverse["method"]
        assert candidate.name.split()[0] == scheme.plan.method
        scheme.bound(32, 32)
        assert recipe.layer(1) == built[0].layer(1)


def test_unknown_names_are_refused():
    with pytest.raises(QDeltaNetError, match="did you mean 'neumann'|neumann"):
        candidates(64, methods=("neuman",))
    with pytest.raises(QDeltaNetError, match="int9x"):
        candidates(64, formats=("int9x",))


def test_overrides_join_those_of_the_base():
    base = load_recipe("int8", ["layers.0.chunk_size=32", "layers.1.inverse.method=neumann"])
    same = overridden(base, {"0": override(Candidate(BASE)), "1": override(Candidate(BASE))})
    assert same.fingerprint == base.fingerprint
    found = overridden(base, {"0": override(Candidate(BASE), ("k",)), "1": override(Candidate(BASE), ("q",))})
    assert found.layer(0).plan.chunk_size == 32
    assert found.layer(1).plan.method == "neumann"
    assert found.layer(0).rule.sites["k"].format.name == "int4"
    assert found.layer(1).rule.sites["k"].format.name == "int8"


# -- prices and choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["block_merge", "neumann", "identity"])
def test_savings_equal_the_prices_of_whole_rules(method):
    base = load_recipe("int8")
    own = next(c for c in candidates(64) if c.name.startswith(method) and c.name.endswith("int8"))
    sites = list(NARROWED)
    wide, narrow = (overridden(base, {"*": override(own, s)}) for s in ((), sites))
    savings = Prices(rule_price, {0: DIMS}).savings(wide, narrow, (0,), sites)
    assert len(savings) == 2 ** len(sites)
    for chosen in random.Random(0).sample(sorted(savings), 12):
        whole = rule_price(overridden(base, {"*": override(own, chosen)}).layer(0), DIMS)
        assert rule_price(wide.layer(0), DIMS) - savings[chosen] == pytest.approx(
            whole, rel=1e-12
        )  # sums of other orders


def test_savings_of_layers_with_different_chunk_sizes():
    base = load_recipe("int8", ["layers.1.chunk_size=16"])
    sites = list(NARROWED)
    wide, narrow = (overridden(base, {"*": override(Candidate(BASE), s)}) for s in ((), sites))
    both = Prices(rule_price, {0: DIMS, 1: DIMS}).savings(wide, narrow, (0, 1), sites)
    each = [Prices(rule_price, {i: DIMS}).savings(wide, narrow, (i,), sites) for i in (0, 1)]
    assert each[0] != each[1]
    assert both == {chosen: each[0][chosen] + each[1][chosen] for chosen in both}


def test_choose_is_the_best_of_all_combinations():
    make = random.Random(1)
    groups = [pareto(Option(f"{g}{i}", (), make.random(), make.random()) for i in range(9)) for g in range(4)]
    every = list(itertools.product(*groups))
    for budget in (0.3, 0.7, 1.1, 5.0):
        within = [c for c in every if sum(o.loss for o in c) <= budget]
        found = choose(groups, budget)
        if not within:
            assert found is None
            continue
        assert found is not None
        assert sum(o.loss for o in found) <= budget + 1e-6
        best = min(sum(o.cost for o in c) for c in within)
        assert sum(o.cost for o in found) == pytest.approx(best, abs=1e-9)
    assert choose(groups, sum(o.loss for o in least_loss(groups)) - 0.01) is None


def test_pareto_drops_what_is_beaten():
    a, b, c, d = Option("a", (), 1, 3), Option("b", (), 2, 3), Option("c", (), 2, 1), Option("d", (), 3, 2)
    assert pareto([d, c, b, a]) == [a, c]


def test_spread_keeps_both_ends():
    assert spread(3, 12) == [0, 1, 2]
    assert spread(9, 1) == [0]
    assert spread(9, 3) == [0, 4, 8]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("mode", ["float", "fixed_point", "power_of_two"])
def test_candidates_keep_the_mode_and_accumulator_of_the_base(mode, bits):
    systems = Systems.of(family("silu").matrices(Shape(2, 4, 16)))
    settings = ["chunk_size=16", f"requantize={mode}", f"accumulator_bits={bits}"]
    scheme = load_recipe("int8", settings).layer(0)
    bound, scales = systems.scales(scheme)
    assert (bound.requantize, bound.accumulator_bits) == (mode, bits)
    powers = all(bool((torch.frexp(scale).mantissa == 0.5).all()) for scale in scales.values())
    assert powers == (mode == "power_of_two")
    assert systems.error(scheme) < 0.05


def test_tokens_that_float_cannot_guess_do_not_count():
    logits = torch.tensor([[[5.0, 0, 0], [0, 5, 0], [0, 0, 5]]]).log_softmax(-1)
    labels = torch.tensor([[0, 2]])  # the second is predicted worse than chance
    found = torch.tensor([[[4.0, 0, 0], [5, 0, 0], [0, 0, 5]]]).log_softmax(-1)
    kl, nll, counted = _compared(logits, found, labels).tolist()
    assert counted == 1
    assert nll == pytest.approx(float(logits[0, 0, 0] - found[0, 0, 0]))
    assert kl == pytest.approx(float((logits[0, 0].exp() * (logits[0, 0] - found[0, 0])).sum()))


def test_data_that_float_cannot_guess_at_all_is_refused(samples):
    model = tiny()
    first = samples.tokens[:2, :1]
    with torch.no_grad():
        worst = model(input_ids=first).logits[:, -1].argmin(-1, keepdim=True)
    made = Harness(model, load_recipe("int8"), Samples("worst", torch.cat([first, worst], 1), ""))
    made.calibrated(load_recipe("int8"))
    with pytest.raises(QDeltaNetError, match="no token of the second half of the samples counts"):
        made.loss()


def test_error_of_T_falls_with_bits_and_order():
    systems = Systems.of(family("silu").matrices(Shape(2, 8, 32)))
    errors = {}
    for name in ("block_merge 2,2,2,2,2", "neumann 2 none 1 ", "neumann 4 none 1 "):
        for fmt in ("int8", "int4"):
            chosen = next(c for c in candidates(32) if c.name.startswith(name) and c.name.endswith(fmt))
            recipe = overridden(load_recipe("int8", ["chunk_size=32"]), {"*": override(chosen)})
            errors[name, fmt] = systems.error(recipe.layer(0))
    assert errors["block_merge 2,2,2,2,2", "int8"] < 0.03 < errors["block_merge 2,2,2,2,2", "int4"]
    assert errors["block_merge 2,2,2,2,2", "int8"] < errors["neumann 4 none 1 ", "int8"]


def test_a_large_vocabulary_changes_nothing(samples, monkeypatch):
    """Float logits that are not kept are computed again, by an exact inverse whatever the layers' plans are."""
    losses = []
    for kept in (2**30, 0):
        monkeypatch.setattr("qdeltanet.calib.search.harness.KEPT_BYTES", kept)
        made = harness(samples)
        made.calibrated(load_recipe("neumann-int8"))
        losses.append([made.loss(), made.loss()])
        assert all(layer.scheme.plan.method == "neumann" for layer in made.layers.values())
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[0][1]


# -- the whole search --------------------------------------------------------------------------------------------------


def test_search_meets_its_budget_at_less_cost(samples):
    journal = Journal(None, {})
    found = search(harness(samples), load_recipe("int8"), price, 0.05, QUICK, journal=journal)
    assert found.point.loss.kl <= 0.05
    assert found.point.cost < found.base.cost
    assert found.point.cost == min(p.cost for p in found.front if p.loss.kl <= 0.05)
    assert found.point.cost == pytest.approx(sum(price(found.recipe.layer(i), DIMS) for i in (0, 1)))
    fresh = harness(samples)
    fresh.calibrated(found.recipe)
    assert fresh.loss() == found.point.loss  # of the recipe itself, without what the search knew
    with pytest.raises(QDeltaNetError, match=r"budget 1e-09 nats per token: the least that was found is 0\.0"):
        search(harness(samples), load_recipe("int8"), price, 1e-9, QUICK, journal=journal)


def test_power_of_two_base_and_references(samples):
    """Scales of a candidate follow the base's mode; a reference with other projections cannot be measured here."""
    base = load_recipe("int8", ["requantize=power_of_two", "name=shifts"])
    references = [load_recipe("int8"), load_recipe("int8", ["name=whole", "projections={'*': {}}"])]
    assert references[1].layer(0).projections
    settings = Settings(**{**vars(QUICK), "uniform": True})
    found = search(harness(samples), base, price, LOOSE, settings, references=references)
    assert found.recipe.requantize == "power_of_two"
    assert found.point.choices["*"]["inverse"] != BASE
    assert [p.name for p in found.references] == ["int8"]
    assert found.left_out == ["whole"]


def test_a_base_without_a_finite_loss_is_refused(samples):
    journal = Journal(None, {})
    journal.measured["loss base"] = Loss(math.inf, math.inf).as_list()
    with pytest.raises(QDeltaNetError, match="base recipe int8: its loss is not finite"):
        search(harness(samples), load_recipe("int8"), price, LOOSE, QUICK, journal=journal)


def test_an_infinite_loss_is_null():
    good, lost = (Point("p", 1.0, 0.1, loss, {}) for loss in (Loss(0.1, 0.1), Loss(math.inf, math.inf)))
    found = Found(load_recipe("int8"), good, [good, lost], good, [lost], [], {"0": {"loss": math.inf}})
    result = content(found, PROFILE, 0.5, {})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["references"][0]["loss"] == {"kl": None, "nll": None}
    assert picture(result).startswith(b"\x89PNG")


def test_uniform_gives_all_layers_one_choice(samples):
    settings = Settings(**{**vars(QUICK), "uniform": True})
    found = search(harness(samples), load_recipe("int8"), price, LOOSE, settings)
    assert set(found.recipe.layers) == {"*"}
    assert found.recipe.layer(0) == found.recipe.layer(1)
    assert found.point.cost < found.base.cost


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_empty_budgets_are_refused(samples, budget):
    with pytest.raises(QDeltaNetError, match="must be a positive number"):
        search(harness(samples), load_recipe("int8"), price, budget, QUICK)


def test_bad_beginnings_are_refused(samples):
    with pytest.raises(QDeltaNetError, match="at least 2 samples"):
        Harness(tiny(), load_recipe("int8"), Samples("x", samples.tokens[:1], ""))
    with pytest.raises(QDeltaNetError, match="leaves the rule in float"):
        search(Harness(tiny(), load_recipe("float"), samples), load_recipe("float"), price, 1.0, QUICK)


class Cut(Exception):
    """The power went off."""


def run_to(output: Path, samples: Samples, stop: int | None = None, budget: float = LOOSE, **more: Any) -> Any:
    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Cut

    settings, profile = more.pop("settings", QUICK), more.pop("profile", PROFILE)
    base, model = more.pop("base", None) or load_recipe("int8"), more.pop("model", None) or tiny()
    return search_to(output, model, base, samples, profile, budget, settings, progress=progress, **more)


def test_resumed_and_refused(samples, tmp_path):
    whole, cut = tmp_path / "a" / "found.yaml", tmp_path / "b" / "found.yaml"
    result = run_to(whole, samples)
    names = ["found.pareto.json", "found.pareto.png", "found.search.json", "found.yaml"]
    assert sorted(p.name for p in whole.parent.iterdir()) == names
    assert load_recipe(whole).description.startswith("Found by search on profile ascend-910b within 5 nats")
    assert json.loads((whole.parent / "found.pareto.json").read_text())["chosen"] == result["chosen"]
    for stop in (3, 9, 14):
        with pytest.raises(Cut):
            run_to(cut, samples, stop)
        assert [p.name for p in cut.parent.iterdir()] == ["found.search.json"]
    run_to(cut, samples)
    for name in names:
        assert (whole.parent / name).read_bytes() == (cut.parent / name).read_bytes()
    assert run_to(cut, samples) is None
    with pytest.raises(QDeltaNetError, match="for another budget"):
        run_to(cut, samples, budget=0.05)
    before = json.loads((cut.parent / "found.search.json").read_text())["measured"]
    run_to(cut, samples, budget=0.05, overwrite=True)
    after = json.loads((cut.parent / "found.search.json").read_text())["measured"]
    assert {k: after[k] for k in before} == before
    with pytest.raises(QDeltaNetError, match=r"of another search \(.*settings\.methods was .*: pass --overwrite"):
        run_to(cut, samples, settings=Settings(("identity",), ("int8",)))
    (cut.parent / "found.search.json").write_text("{")
    with pytest.raises(QDeltaNetError, match="no record of a search"):
        run_to(cut, samples, budget=1.0)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_killed_at_random_moments(samples, tmp_path):
    """kill -9, every second time while the journal is being written; then as one that was left alone, byte for byte."""
    whole, cut = tmp_path / "a" / "found.yaml", tmp_path / "b" / "found.yaml"
    start = time.monotonic()
    assert ended(child(lambda: run_to(whole, samples)))
    took = time.monotonic() - start
    when, cut_short = random.Random(0), 0
    for turn in range(6):
        pid = child(lambda: run_to(cut, samples))
        until = time.monotonic() + when.uniform(0.05, 0.3) * took
        while time.monotonic() < until or turn % 2:
            if turn % 2 and any(cut.parent.glob(".found.search.json.partial-*")):
                break
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        cut_short += not ended(pid, kill=True)
    assert cut_short >= 3
    assert ended(child(lambda: run_to(cut, samples)))
    assert files(cut.parent) == files(whole.parent)


def test_cut_off_between_the_files_at_the_end(samples, tmp_path):
    """Picture, figures, recipe are written in this order: whichever are there, the same command goes on."""
    output = tmp_path / "found.yaml"
    run_to(output, samples)
    loose = files(tmp_path)
    run_to(output, samples, budget=0.05, overwrite=True)
    tight = files(tmp_path)

    def left(before: dict[str, bytes], after: dict[str, bytes], written: int) -> None:
        new = ["found.search.json", "found.pareto.png", "found.pareto.json"][: 1 + written]
        for path in tmp_path.iterdir():
            path.unlink()
        for name, found in {**before, **{n: after[n] for n in new}}.items():
            output.with_name(name).write_bytes(found)

    for written in (0, 2):
        left({}, loose, written)
        assert run_to(output, samples) is not None
        assert files(tmp_path) == loose
    for written in (1, 2):
        left(loose, tight, written)
        with pytest.raises(QDeltaNetError, match="is there already, for another budget or not of a search"):
            run_to(output, samples, budget=0.05)
        assert run_to(output, samples, budget=0.05, overwrite=True) is not None
        assert files(tmp_path) == tight
    assert run_to(output, samples, budget=0.05) is None


def test_a_full_disk_keeps_what_was_measured(tmp_path):
    journal = Journal(tmp_path / "found.search.json", {"model": "x"})
    journal.measure("a", lambda: [1.0])
    before = files(tmp_path)
    said = said_by_child(limited(lambda: journal.measure("b", lambda: [2.0] * 100), size=200))
    assert said == f"cannot write {journal.path}: File too large"
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("old", "new"), [(b"1.5", b"1.6"), (b'"a"', b'"b"'), (b"{", b""), (b"x", b"y"), (None, b""), (None, b"[1]")]
)
def test_a_damaged_journal_is_one_line(tmp_path, old, new):
    path = tmp_path / "found.search.json"
    journal = Journal(path, {"model": "x"})
    journal.measure("a", lambda: [1.5])
    path.write_bytes(new if old is None else path.read_bytes().replace(old, new, 1))
    with pytest.raises(
        QDeltaNetError, match=r"found\.search\.json: no record of a search \([^\n]*\); pass --overwrite"
    ):
        Journal(path, {"model": "x"})
    assert Journal(path, {"model": "x"}, overwrite=True).measured == {}


def test_what_a_search_depends_on_is_noticed(samples, tmp_path):
    output = tmp_path / "found.yaml"
    with pytest.raises(Cut):
        run_to(output, samples, 1)
    trained = tiny()
    with torch.no_grad():
        trained.model.norm.weight[0] += 1
    other = Samples(samples.name, samples.tokens.flip(0), "other")
    changed = {
        r"\(model\.fingerprint differs\)": {"model": trained},
        r"\(dataset\.sha256 differs\)": {"samples": other},
        r"\(recipe differs\)": {"base": load_recipe("int8", ["inverse.radices=[4,4,4]"])},
        r"\(profile\.name was ascend-910b, is hexagon; profile\.sha256 differs\)": {"profile": load_profile("hexagon")},
        r"\(settings\.seed was 0, is 1\)": {"settings": Settings(**{**vars(QUICK), "seed": 1})},
        r"\(batch_size was 16, is 2\)": {"batch_size": 2},
    }
    for differs, asked in changed.items():
        with pytest.raises(QDeltaNetError, match=f"of another search {differs}: pass --overwrite"):
            run_to(output, **{"samples": samples, **asked})
    with threads(3), pytest.raises(QDeltaNetError, match=r"threads was \d, is 3"):
        run_to(output, samples)


def test_a_refusal_leaves_nothing(samples, tmp_path):
    output = tmp_path / "found.yaml"
    with pytest.raises(QDeltaNetError, match="must be a positive number"):
        run_to(output, samples, budget=0.0)
    assert not list(tmp_path.iterdir())
    output.write_text("name: mine")
    with pytest.raises(QDeltaNetError, match="is there already"):
        run_to(output, samples)
    assert [p.name for p in tmp_path.iterdir()] == ["found.yaml"]


def test_measurements_of_another_machine_are_not_taken(samples, tmp_path, monkeypatch):
    output = tmp_path / "found.yaml"
    with pytest.raises(Cut):
        run_to(output, samples, 1)
    request = json.loads((tmp_path / "found.search.json").read_text())["request"]
    assert (request["dtype"], request["device"]) == ("float32", f"cpu {torch.backends.cpu.get_cpu_capability()}")
    assert request["versions"]["torch"] == torch.__version__
    half = load_model(model_path("tiny-recall"), "bfloat16")
    with pytest.raises(QDeltaNetError, match=r"of another search \(.*dtype was float32, is bfloat16"):
        run_to(output, samples, model=half)
    monkeypatch.setattr("qdeltanet.calib.search.session.VERSION", 0)
    with pytest.raises(QDeltaNetError, match=r"of another search \(versions\.journal was 3, is 0\)"):
        run_to(output, samples)


# -- the published method ----------------------------------------------------------------------------------------------


def test_adapted_pairs():
    """At 32 the published pair (4, 3) comes out; at 64 more orders than the published (3, 8) has are needed."""
    profile = load_profile("hexagon")
    A = family("gates_small").matrices(Shape(4, 16, 32))
    small = adapt_neumann(A, profile, 0.05)
    assert small.best is not None
    assert (small.best.order, small.best.residual_steps) == (4, 3)
    assert small.best.cost == min(p.cost for p in small.grid if p.worst <= 0.05)
    worst = {(p.order, p.residual_steps): p.worst for p in small.grid}
    assert worst[3, 3] > 0.05 > worst[3, 8]
    with pytest.raises(QDeltaNetError, match="budget 0"):
        adapt_neumann(A, profile, 0.0)
    assert adapt_neumann(A, profile, 1e-6).best is None


def test_adapt_costs_are_those_of_the_plan():
    found = adapt_neumann(family("silu").matrices(Shape(2, 4, 16)), load_profile("hexagon"), 0.1)
    built = plan("neumann", 16, order=3, band=3, residual_steps=4)
    pair = next(p for p in found.grid if (p.order, p.residual_steps) == (3, 4))
    assert (pair.matmuls, pair.depth) == (built.matmuls, built.depth)
    assert len(found.grid) == 64
