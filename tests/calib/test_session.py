"""An interrupted calibration goes on, and ends with the bits of one that was not: scales and report."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeltanet.calib import calibrate
from qdeltanet.calib.data import Samples
from qdeltanet.calib.passes import RangesPass
from qdeltanet.calib.request import request_of
from qdeltanet.calib.run import forward, watching
from qdeltanet.calib.session import Resume, Session, disjoint
from qdeltanet.calib.state_file import read_state, write_state
from qdeltanet.checkpoint import Calibration
from qdeltanet.core import QDeltaNetError
from qdeltanet.models import model_fingerprint, quantize_model, quantized_layers
from qdeltanet.recipe import Recipe, load_recipe

BATCHES = 5
KINDS = {"k": "percentile", "v_new": "mse", "attn": "kl"}
EVERY_KIND = [f"sites.{site}.observer={{kind: {kind}}}" for site, kind in KINDS.items()]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "minmax": ("int8", []),
    "every observer": ("w8a8", ["projections.proj.*.scale=calibrated", *EVERY_KIND]),
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(*RECIPES[name])


def samples(seed: int = 3) -> Samples:
    tokens = torch.randint(0, 100, (2 * BATCHES, 70), generator=torch.Generator().manual_seed(seed))
    return Samples("random", tokens, f"digest {seed}")


class Killed(Exception):
    """Stands for the end of the process: nothing is done about it."""


def run(
    model: Any,
    resume: Resume | None,
    *,
    stop: int | None = None,
    recipe: str = "minmax",
    ticks: list[int] | None = None,
    **other: Any,
) -> Any:
    """A calibration that ends after `stop` batches; returns it and the first tick. ticks: takes all."""
    ticks = [] if ticks is None else ticks

    def progress(done: int, total: int) -> None:
        ticks.append(done)
        if done == stop:
            raise Killed

    options = {"batch_size": 2, "threads": 1, "samples": samples(), **other}
    return calibrate(model, recipe_of(recipe), resume=resume, progress=progress, **options), ticks[0]


def equal(a: Calibration, b: Calibration) -> bool:
    same = a.scales.keys() == b.scales.keys() and all(torch.equal(a.scales[k], b.scales[k]) for k in a.scales)
    return same and json.dumps(a.report) == json.dumps(b.report)


@pytest.fixture(scope="module")
def expected(random_model: Callable[[], Any]) -> Callable[[str], Calibration]:
    """The uninterrupted calibration by recipe."""
    made: dict[str, Calibration] = {}

    def find(recipe: str) -> Calibration:
        if recipe not in made:
            made[recipe] = run(random_model(), None, recipe=recipe)[0]
        return made[recipe]

    return find


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".cal.calibrating"


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_in_both_passes(random_model, expected, folder, recipe):
    """Ended in the first pass, between the passes, in the second: every start does what is left and no more."""
    resume = Resume(folder, every=0)
    for stop in (3, 5, 9):
        with pytest.raises(Killed):
            run(random_model(), resume, stop=stop, recipe=recipe)
    ticks: list[int] = []
    done = run(random_model(), resume, recipe=recipe, ticks=ticks)[0]
    assert ticks == [5, 9, 10]  # the whole first pass and 4 batches of the second were there
    assert equal(done, expected(recipe))
    resume.remove()
    assert list(folder.parent.iterdir()) == []


def test_what_was_not_saved_is_run_again(random_model, expected, folder):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=1000), stop=8)  # saved at the end of the first pass alone
    done, first = run(random_model(), Resume(folder))
    assert first == BATCHES
    assert equal(done, expected("minmax"))


def test_where_state_stands():
    for output, beside in (("a/cal", "a/.cal.calibrating"), ("cal", ".cal.calibrating"), ("/", "/..calibrating")):
        assert Resume.beside(Path(output)).folder == Path(beside).absolute()


def test_without_a_folder_nothing_is_written(random_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(random_model(), None)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_without_state_leaves_no_folder(random_model, folder):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder), stop=1)
    assert not folder.exists()


def one_share(model: Any, folder: Path, batches: list[int]) -> None:
    """What one process among several leaves of the first pass."""
    recipe, data = recipe_of("minmax"), samples()
    quantize_model(model, recipe)
    request = request_of(
        model_name="", fingerprint=model_fingerprint(model), dtype=model.dtype, device=model.device, recipe=recipe,
        samples=data, batch_size=2, threads=torch.get_num_threads(), weights=None,
    )  # fmt: skip
    session = Session(Resume(folder, every=0), request)
    watchers = RangesPass(recipe).watchers(quantized_layers(model))
    with watching(model, watchers):
        for batch in batches:
            forward(model, data.tokens.split(2)[batch])
            session.finished("ranges", watchers, batch)


@pytest.mark.parametrize(
    ("shares", "left"),
    [([[0, 2], [1, 3]], 4), ([[0, 3], [1, 4], [2]], 5), ([[4], [0, 1, 4]], 3), ([[0, 1], [1, 2], [3]], 3)],
    ids=["two processes", "three, all done", "one is in the other", "two that overlap"],
)
def test_states_of_several_processes(random_model, expected, folder, shares, left):
    torch.set_num_threads(1)
    for batches in shares:
        one_share(random_model(), folder, batches)
    assert len(list(folder.glob("ranges-*.safetensors"))) == len(shares)
    done, first = run(random_model(), Resume(folder))
    assert first == left
    assert equal(done, expected("minmax"))
    assert len(list(folder.glob("*.safetensors"))) == 2  # one whole state per pass


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 5}, "dataset.batch_size was 2, is 5"),
        ({"samples": samples(4)}, "dataset.sha256 was digest 3, is digest 4"),
        ({"threads": 2}, "environment.threads was 1, is 2"),
        ({"model_name": "other"}, "model.name was , is other"),
        ({"recipe": "every observer"}, "recipe.name was int8, is w8a8; recipe.fingerprint differs"),
        ({"model": "other"}, "model.fingerprint differs"),
    ],
)
def test_a_changed_request_is_refused_unless_it_may_replace(random_model, expected, folder, change, says):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=0), stop=3)
    there = {p: p.read_bytes() for p in folder.iterdir()}
    change = dict(change)
    model = random_model()
    if change.pop("model", None):
        model.model.layers[0].linear_attn.A_log.data += 0.1
    with pytest.raises(QDeltaNetError, match="of another calibration") as refused:
        run(model, Resume(folder), **change)
    assert f"({says})" in str(refused.value)
    assert {p: p.read_bytes() for p in folder.iterdir()} == there
    with pytest.raises(Killed):
        run(model, Resume(folder, every=0, overwrite=True), stop=1, **change)
    assert all(p.read_bytes() != there.get(p) for p in folder.iterdir())


def test_overwrite_goes_on_with_its_own_request(random_model, expected, folder):
    """An interrupted `--overwrite` is finished by the same command."""
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=0, overwrite=True), stop=3)
    done, first = run(random_model(), Resume(folder, every=0, overwrite=True))
    assert first == 3
    assert equal(done, expected("minmax"))


@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "metadata", "of another"])
def test_damaged_states(random_model, expected, folder, damage):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=0), stop=3)
    (file,) = folder.glob("ranges-*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[:-7]
    elif damage == "a bit":
        content[-7] ^= 1
    elif damage == "empty":
        content = bytearray()
    elif damage == "metadata":
        content = bytearray(bytes(content).replace(b"[0, 1, 2]", b"[0, 1, 3]"))
    else:
        write_state(file, "other", [0], {0: {}})
        content = bytearray(file.read_bytes())
    file.write_bytes(content)
    with pytest.raises(QDeltaNetError, match=r"ranges-\w+.safetensors: damaged; delete it and give the same command"):
        run(random_model(), Resume(folder))
    file.unlink()
    assert equal(run(random_model(), Resume(folder))[0], expected("minmax"))


def test_a_damaged_request(random_model, folder):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=0), stop=3)
    (folder / "request.json").write_text('{"mod')
    with pytest.raises(QDeltaNetError, match="request.json cannot be read .* --overwrite"):
        run(random_model(), Resume(folder))


# -- the disk ----------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_earlier_state(random_model, expected, folder):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=0), stop=3)
    (file,) = folder.glob("ranges-*.safetensors")
    content = file.read_bytes()
    with largest_file(len(content) // 2), pytest.raises(QDeltaNetError, match=r"cannot write .*: File too large"):
        run(random_model(), Resume(folder, every=0))
    assert [p.name for p in sorted(folder.iterdir())] == [file.name, "request.json"]
    assert file.read_bytes() == content
    done, first = run(random_model(), Resume(folder))
    assert first == 3
    assert equal(done, expected("minmax"))


@pytest.mark.parametrize("place", ["file/.cal.calibrating", "/proc/here/.cal.calibrating"])
def test_a_folder_that_cannot_be_written(random_model, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(QDeltaNetError, match="cannot write .*request.json"):
        run(random_model(), Resume(tmp_path / place))


def test_what_a_killed_write_left_is_swept(random_model, expected, folder):
    with pytest.raises(Killed):
        run(random_model(), Resume(folder, every=0), stop=3)
    (folder / ".ranges-0123456789ab.safetensors.partial-99").write_bytes(b"half")
    assert equal(run(random_model(), Resume(folder))[0], expected("minmax"))
    assert not list(folder.glob(".*partial*"))


# -- parts -------------------------------------------------------------------------------------------------------------


def test_state_files_hold_integers_of_any_size(tmp_path):
    state = {
        3: {"counts": torch.tensor([2**62, -1]), "plain": {"a": [2**300, -(2**70)], "b": 0.1}, "none": None},
        11: {"x/y": torch.zeros(2, 0, 3), "scalar": torch.tensor(7)},
    }
    write_state(tmp_path / "s.safetensors", "key", [4, 7], state)
    found = read_state(tmp_path / "s.safetensors", "key")
    assert found.batches == [4, 7]
    assert found.layers.keys() == state.keys()
    assert found.layers[3]["plain"] == state[3]["plain"]
    for layer, name in ((3, "counts"), (11, "x/y"), (11, "scalar")):
        assert torch.equal(found.layers[layer][name], state[layer][name])


@given(st.dictionaries(st.text("abc", min_size=1), st.lists(st.integers(0, 12), unique=True)))
def test_disjoint_files(files):
    chosen = disjoint(files)
    taken = [batch for file in chosen for batch in files[file]]
    assert len(taken) == len(set(taken))
    for file in files.keys() - chosen:  # nothing that fits is left out
        assert not files[file] or set(files[file]) & set(taken)
    assert len(taken) >= max(map(len, files.values()), default=0)
