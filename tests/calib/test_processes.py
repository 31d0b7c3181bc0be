"""The command, killed at any moment and on any number of processes: the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import LIMIT, Fleet, content, finished, wait

COMMAND = ["calibrate", "tiny-recall", "-r", "int8", "--samples", "40", "--batch-size", "1", "--threads", "1"]
COMMAND += ["--save-every", "0", "--quiet"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("expected")
    alone = Fleet(folder)
    code, said = finished(alone.start(*COMMAND, "--output", str(folder / "cal")))
    assert code == 0, said
    assert not (folder / ".cal.calibrating").exists()
    return content(folder / "cal")


def after_saves(folder: Path, n: int) -> Callable[[], bool]:
    """Whether files of the state came or went n times since the first look."""
    seen: set[int] = set()

    def found() -> bool:
        if folder.exists():
            seen.add(folder.stat().st_mtime_ns)
        return len(seen) > n

    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(fleet, expected, tmp_path, seed):
    choose = random.Random(seed)
    output, state = tmp_path / "cal", tmp_path / ".cal.calibrating"
    for _ in range(4):
        process = fleet.start(*COMMAND, "--output", str(output))
        wait(after_saves(state, choose.randrange(2, 12)), process)
        time.sleep(choose.random() * 0.02)
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not output.exists()
    process = fleet.start(*COMMAND, "--output", str(output))
    wait(lambda: any(tmp_path.glob(".cal.partial-*")), process)  # while the result is written, if that is seen
    process.kill()
    process.join()
    code, said = finished(fleet.start(*COMMAND, "--output", str(output)))
    assert code == 0, said
    assert content(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cal", "logs"]


def test_a_full_disk(fleet, expected, tmp_path):
    """First for the state, then for the result: one line each time, and what was done stays."""
    output = tmp_path / "cal"
    report = len(expected["calibration.json"])  # the largest file of all
    for largest_file, name in ((2500, "ranges-"), (report - 1, f"{output}: ")):
        code, said = finished(fleet.start(*COMMAND, "--output", str(output), largest_file=largest_file))
        assert code == 2, said
        assert len(said.strip().splitlines()) == 1
        assert said.startswith("qdeltanet: cannot write ")
        assert name in said
        assert "File too large" in said
        assert not output.exists()
    assert len(list((tmp_path / ".cal.calibrating").glob("*.safetensors"))) == 2
    code, said = finished(fleet.start(*COMMAND, "--output", str(output)))
    assert code == 0, said
    assert content(output) == expected


def test_two_and_three_processes(fleet, expected, tmp_path):
    for world in (2, 3):
        output = tmp_path / f"cal-{world}"
        group = fleet.start_group(world, *COMMAND, "--output", str(output))
        ends = [finished(process) for process in group]
        assert [code for code, _ in ends] == [0] * world, ends
        assert content(output) == expected
        assert [bool(said) for _, said in ends] == [True] + [False] * (world - 1)  # the first alone speaks
        assert not (tmp_path / f".cal-{world}.calibrating").exists()


def test_processes_that_fail_or_die(fleet, expected, tmp_path):
    """The second of two has a full disk; then one of three is killed; then one finishes."""
    output, state = tmp_path / "cal", tmp_path / ".cal.calibrating"
    ends = [finished(p) for p in fleet.start_group(2, *COMMAND, "--output", str(output), largest={1: 2500})]
    assert [code for code, _ in ends] == [2, 2], ends
    assert ends[0][1] == ""
    assert ends[1][1].startswith("qdeltanet: process 1 of 2: cannot write ")

    group = fleet.start_group(3, *COMMAND, "--output", str(output))
    wait(after_saves(state, 15), group[0])
    group[1].kill()
    start = time.monotonic()
    ends = [finished(process) for process in group]
    assert time.monotonic() - start < 30
    assert [code for code, _ in ends] == [2, -9, 2], ends
    said = [said for _, said in ends if said]
    assert len(said) == 1
    assert "another process ended or fell silent" in said[0]
    assert len(list(state.glob("*.safetensors"))) >= 3
    assert not output.exists()

    code, said = finished(fleet.start(*COMMAND, "--output", str(output)))
    assert code == 0, said
    assert content(output) == expected


def test_under_a_launcher(fleet, expected, tmp_path):
    """torchrun ends the job when a worker is killed, and any number of processes goes on."""
    output, state = tmp_path / "cal", tmp_path / ".cal.calibrating"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, "-m", "qdeltanet", *COMMAND, "--output", str(output)]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + LIMIT
        while not any(state.glob("ranges-*.safetensors")):
            assert time.monotonic() < end
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), 9)
        assert job.wait(LIMIT) != 0
    finally:
        job.kill()
        job.wait()
    assert not output.exists()
    ends = [finished(process) for process in fleet.start_group(2, *COMMAND, "--output", str(output))]
    assert [code for code, _ in ends] == [0, 0], ends
    assert content(output) == expected
