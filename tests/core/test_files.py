"""Whole files and directories: replaced in one step, also under a full disk, without permission, and when killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import as_somebody, child, ended, limited, said_by_child
from safetensors.torch import save_file

from qdeltanet.core import QDeltaNetError, partial
from qdeltanet.core.files import check_file, check_output, sha256_file, whole_directory, write_bytes, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with whole_directory(target) as partial:
        (partial / "x.txt").write_text("x")
        assert not target.exists()
    assert (target / "x.txt").read_text() == "x"
    assert names(target.parent) == ["out"]


def test_others_may_read_it(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out") as made:
        save_file({"x": torch.zeros(1)}, made / "x.safetensors")
        (made / "x.txt").write_text("x")
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "out" / "x.txt").stat().st_mode}
    (tmp_path / "dir").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "dir").stat().st_mode


def test_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_directory(tmp_path / "out") as partial:
            (partial / "x.txt").write_text("x")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_one_step", [True, False])
def test_what_stands_there_is_kept_unless_overwriting_succeeds(tmp_path: Path, monkeypatch, in_one_step) -> None:
    if not in_one_step:
        monkeypatch.setattr(partial, "exchange", lambda a, b: False)  # as where the system cannot
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(QDeltaNetError, match="not empty; pass --overwrite"):
        check_output(target, overwrite=False)
    with pytest.raises(RuntimeError, match="interrupted"), whole_directory(target, overwrite=True):
        raise RuntimeError("interrupted")
    assert (target / "old").read_text() == "old"
    with whole_directory(target, overwrite=True) as made:
        (made / "new").write_text("new")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with whole_directory(tmp_path / "link", overwrite=True) as made:
        (made / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]
    (tmp_path / "x.json").symlink_to("real/x.json")
    write_text(tmp_path / "x.json", "x")
    assert (tmp_path / "real" / "x.json").read_text() == "x"
    assert names(tmp_path) == ["link", "real", "x.json"]


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_text(path, "ä")
    write_text(path, "b")
    assert path.read_text(encoding="utf-8") == "b"
    assert names(path.parent) == ["x.json"]
    assert sha256_file(path) == hashlib.sha256(b"b").hexdigest()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("here")
    with pytest.raises(QDeltaNetError, match="is a file; name a directory"):
        check_output(text, overwrite=True)
    for check in (lambda: check_output(text / "a" / "b", True), lambda: check_file(text / "x.json")):
        with pytest.raises(QDeltaNetError, match=r"text\.txt is a file, not a folder"):
            check()
    with pytest.raises(QDeltaNetError, match=r"cannot write .*below/a-file: Not a directory"):
        write_text(text / "below" / "a-file", "x")
    with pytest.raises(QDeltaNetError, match="it is a folder; name a file"):
        check_file(tmp_path)
    with pytest.raises(QDeltaNetError, match="Is a directory"):
        write_text(tmp_path, "x")
    with pytest.raises(QDeltaNetError, match="name a directory that can be made or replaced"):
        check_output(Path("."), overwrite=True)
    assert text.read_text() == "here"


def test_a_file_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    check_file(None)
    check_file(tmp_path / "new" / "deep" / "x.json")
    check_output(tmp_path / "new" / "deep" / "out", overwrite=False)
    assert not (tmp_path / "new").exists()


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_text(path, "earlier")
    said = said_by_child(limited(lambda: write_bytes(path, bytes(10**6))))
    assert said == f"cannot write {path}: File too large"
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["x.json"]
    with pytest.raises(QDeltaNetError, match=r"cannot write /dev/full: No space left on device"):
        write_text(Path("/dev/full"), "x")
    write_text(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    Tokenizer(BPE({f"token {i}": i for i in range(100)}, [])).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "x.json").write_text(json.dumps(list(range(1000)))),
        lambda folder: save_file({"x": torch.zeros(1000)}, folder / "x.safetensors"),
        lambda folder: write_text(folder / "deep" / "x.txt", "x" * 1000),
        save_tokenizer,
        lambda folder: shutil.copyfile(__file__, folder / "copy"),
    ],
    ids=["json", "safetensors", "whole file", "tokenizer", "copy"],
)
def test_a_full_disk_inside_of_a_directory(tmp_path: Path, write) -> None:
    target = tmp_path / "out"
    with whole_directory(target) as made:
        (made / "earlier").write_text("earlier")

    def overwrite() -> None:
        with whole_directory(target, overwrite=True) as made:
            write(made)

    said = said_by_child(limited(overwrite))
    assert said in (f"cannot write {target}: File too large", f"cannot write {target}/deep/x.txt: File too large")
    assert names(target) == ["earlier"]
    assert names(tmp_path) == ["out"]


def test_other_errors_inside_are_not_about_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / "out"):
        (tmp_path / "missing.jsonl").read_text()


# -- without permission ------------------------------------------------------------------------------------------------


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that others may read."""
    folder = Path(tempfile.mkdtemp())
    (folder / "out").mkdir()
    (folder / "out" / "x").write_text("x")
    (folder / "hidden").mkdir(mode=0o700)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def make(path: Path) -> None:
    with whole_directory(path, overwrite=True):
        pass


def test_no_permission_is_one_line(closed: Path) -> None:
    line = f"no permission to write into {closed}"
    assert said_by_child(as_somebody(lambda: check_file(closed / "x.json"))).endswith(line)
    assert said_by_child(as_somebody(lambda: make(closed / "out"))).endswith(line)
    assert said_by_child(as_somebody(lambda: make(closed / "new" / "out"))).endswith(line)
    said = said_by_child(as_somebody(lambda: write_text(closed / "x.json", "x")))
    assert said == f"cannot write {closed / 'x.json'}: Permission denied"
    if os.getuid() == 0:
        said = said_by_child(as_somebody(lambda: make(closed / "hidden" / "out")))
        assert said == f"cannot write {closed / 'hidden' / 'out'}: Permission denied"
    assert names(closed) == ["hidden", "out"]
    assert names(closed / "out") == ["x"]


# -- kill -9 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_one_step", [True, False])
def test_killed_at_any_moment(tmp_path: Path, monkeypatch, in_one_step) -> None:
    """Old or new, never half, whatever was being written; and the next one to write cleans up."""
    if not in_one_step:
        monkeypatch.setattr(partial, "exchange", lambda a, b: False)
    target, file = tmp_path / "out", tmp_path / "x.bin"
    size, when = 200_000, random.Random(0)

    def write(n: int) -> None:
        with whole_directory(target, overwrite=True) as made:
            for part in "ab":
                (made / part).write_bytes(bytes([n % 256]) * size)
        write_bytes(file, bytes([n % 256]) * size)

    def forever() -> None:
        n = 0
        while True:
            write(n := n + 1)

    write(0)
    littered = 0
    for _ in range(25):
        pid = child(forever)
        time.sleep(when.uniform(0.002, 0.03))
        ended(pid, kill=True)
        littered += len(names(tmp_path)) > 2
        check_output(target, overwrite=True)  # puts back what stood between the two renames
        contents = [p.read_bytes() for p in (target / "a", target / "b", file)]
        assert contents[0] == contents[1]
        assert all(len(c) == size and len(set(c)) == 1 for c in contents)
        assert names(target) == ["a", "b"]
    assert littered > 0
    write(1)
    assert names(tmp_path) == ["out", "x.bin"]


def test_what_another_process_is_writing_is_not_swept(tmp_path: Path) -> None:
    target, ready, go = tmp_path / "out", tmp_path / "ready", tmp_path / "go"

    def slow() -> None:
        with whole_directory(target) as made:
            (made / "x").write_text("x")
            ready.write_text("")
            while not go.exists():
                time.sleep(0.01)

    pid = child(slow)
    while not ready.exists():
        time.sleep(0.01)
    check_output(target, overwrite=False)
    go.write_text("")
    assert ended(pid)
    assert names(target) == ["x"]


def test_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".out.old-0123abcd").mkdir()
    (tmp_path / ".out.old-0123abcd" / "x").write_text("x")
    with pytest.raises(QDeltaNetError, match="not empty; pass --overwrite"):
        check_output(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "x").read_text() == "x"
    (tmp_path / ".out.old-4567abcd").mkdir()
    (tmp_path / ".other.old-4567abcd").mkdir()
    check_output(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == [".other.old-4567abcd", "out"]
