from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qdeltanet.core import QDeltaNetError
from qdeltanet.core.files import check_file, check_output, sha256_file, whole_directory, write_text


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with whole_directory(target) as partial:
        (partial / "x.txt").write_text("x")
        assert not target.exists()
    assert (target / "x.txt").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_directory(tmp_path / "out") as partial:
            (partial / "x.txt").write_text("x")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_kept_unless_overwriting_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(QDeltaNetError, match="not empty; pass --overwrite"):
        check_output(target, overwrite=False)
    with pytest.raises(RuntimeError, match="interrupted"), whole_directory(target, overwrite=True):
        raise RuntimeError("interrupted")
    assert (target / "old").read_text() == "old"
    with whole_directory(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(QDeltaNetError, match="is a file; name a directory"):
        check_output(tmp_path / "out", overwrite=True)


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_text(path, "ä")
    write_text(path, "b")
    assert path.read_text(encoding="utf-8") == "b"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert sha256_file(path) == hashlib.sha256(b"b").hexdigest()
    with pytest.raises(QDeltaNetError, match="cannot write"):
        write_text(path / "below" / "a-file", "x")


def test_a_file_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("here")
    check_file(None)
    check_file(tmp_path / "new" / "deep" / "x.json")
    check_file(tmp_path / "text.txt")
    assert not (tmp_path / "new").exists()
    with pytest.raises(QDeltaNetError, match=r"text\.txt is a file, not a folder"):
        check_file(tmp_path / "text.txt" / "x.json")
    with pytest.raises(QDeltaNetError, match="it is a folder; name a file"):
        check_file(tmp_path)
