"""Evaluation by several processes: the bits of one, from both command lines; and what is said when one of them ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import several
from test_cli import run

from qdeltanet import _processes
from qdeltanet._threads import threads, usable_cores
from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.batches import fitted, generation_batches

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SEVERAL = str(Path(several.__file__))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def launched(n: int, *command: str, by: str = "torchrun") -> subprocess.CompletedProcess[str]:
    """Several processes of a script, or of a module (`-m`), by torchrun or accelerate."""
    options = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", str(n), f"--master-port={free_port()}"],
        "accelerate": [
            "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", f"--main_process_port={free_port()}",
        ],
    }  # fmt: skip
    full = [sys.executable, "-m", *options[by], *command]
    return subprocess.run(full, capture_output=True, text=True, env=ENV, timeout=280)


def answers(samples: Iterable[Any]) -> list[Any]:
    """What lm-eval logs of each document: its number, the text that was generated, the metric."""
    return [(s["doc_id"], s["resps"], s["filtered_resps"], s["exact_match"]) for s in samples]


def test_two_processes_give_the_bits_of_one(tmp_path):
    """Whole texts, one query for two processes, generation; floats and integers; document by document."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    several.evaluated(one)
    done = launched(2, SEVERAL, "evaluated", str(two))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = (one / "found-0.json").read_text()
    assert [(two / f"found-{rank}.json").read_text() for rank in range(2)] == [expected] * 2
    assert json.loads(expected)[1]["tasks"]["bytes"]["nll"]["documents"] == 7

    result = several.continued(one)
    (figures,) = (two / "written").rglob("results_*.json")  # the first process alone writes
    (lines,) = (two / "written").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    assert answers(samples) == answers(result["samples"]["continue"])
    assert json.loads(figures.read_text())["results"] == result["results"]
    assert len({s["resps"][0][0] for s in samples}) > 3
    assert done.stdout.count("exact_match") == 1  # and prints


def test_three_processes_of_the_command_give_the_bits_of_one(tmp_path):
    args = ("evaluate", "tiny-recall", "--tasks", "recall", "--recipe", "neumann-int8", "--limit", "40", "-q")
    one = run(*args, "--json", str(tmp_path / "one.json"))
    assert one.returncode == 0, one.stderr
    three = launched(3, "-m", "qdeltanet", *args, "--json", str(tmp_path / "three.json"), by="accelerate")
    assert three.returncode == 0, three.stderr[-3000:]
    assert [line.rstrip() for line in three.stdout.splitlines()] == [line.rstrip() for line in one.stdout.splitlines()]
    contents = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "three")]
    assert [(c["processes"], c["threads"]) for c in contents] == [(1, usable_cores()), (3, usable_cores())]
    timed = ("seconds", "tokens_per_second")
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in c["rows"]] for c in contents]
    assert rows[0] == rows[1]
    assert rows[0][1]["saturated"] > 0


# -- the end of one is the end of all ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("refused", 2, "qdeltanet: process 1 of 2: the disk is gone"),
        ("broken", 1, "RuntimeError: process 1 of 2: 'a mistake'"),
    ],
)
def test_a_process_that_fails_gives_its_reason(how, code, line):
    """As mpirun starts them, and with nobody to end the others."""
    first, last = bare(2, how)
    assert last.stderr.strip().splitlines()[-1].removeprefix("[rank1]: ") == line
    assert last.returncode == code
    assert (first.returncode, first.stderr) == (2, "")


def test_a_process_that_is_killed_is_missed():
    first, last = bare(2, "killed")
    assert last.returncode == -9
    assert first.returncode == 2
    assert "qdeltanet: process 0 of 2: another process ended or fell silent (" in first.stderr
    assert first.stderr.count("\n") == 1


def test_the_launcher_ends_all_and_says_why():
    done = launched(3, SEVERAL, "refused")
    assert done.returncode != 0
    assert done.stderr.count("qdeltanet: process 2 of 3: the disk is gone") == 1
    assert "QDeltaNetError: the disk is gone" in done.stderr.split("Root Cause")[1]


def bare(n: int, how: str) -> Sequence[subprocess.CompletedProcess[str]]:
    shared = {**ENV, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "PMI_SIZE": str(n)}
    command = [sys.executable, SEVERAL, how]
    started = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**shared, "PMI_RANK": str(rank)})
        for rank in range(n)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [
        subprocess.CompletedProcess(command, p.returncode, None, text) for p, text in zip(started, said, strict=True)
    ]


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_alone_without_a_launcher():
    with _processes.joined() as here:
        assert here == _processes.Processes() == _processes.current()
        assert (here.first, here.gather("x"), here.agree(3)) == (True, ["x"], 3)
        assert here.share(range(4), lambda x: x * x) == [0, 1, 4, 9]
        assert here.device("cuda:1") == "cuda:1"
    many = _processes.Processes(rank=5, world=8, local=1)
    assert [many.device(name) for name in ("cpu", "cuda", "cuda:0", "npu:3")] == ["cpu", "cuda:1", "cuda:1", "npu:1"]


def test_processes_that_cannot_meet(monkeypatch):
    """mpirun says how many there are, not where."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with (
        pytest.raises(QDeltaNetError, match=r"process 0 of 2 did not find the others \(.*MASTER_ADDR expected.*: set"),
        _processes.joined(),
    ):
        raise AssertionError
    assert _processes.current() == _processes.Processes()


def test_accelerate_starts_one_process_on_a_cpu(monkeypatch, tmp_path):
    """However many are asked for; whoever asked is told, and the work is done."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert not _processes.only_one_started()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    done = run("evaluate", "tiny-recall", "--tasks", "recall", "--execution", "x", "-q")
    assert done.returncode == 2
    assert done.stderr.startswith("qdeltanet: `accelerate launch --cpu` starts one process")


def test_threads_are_those_asked_for():
    with threads(1) as one, threads(None) as all_of_them:
        assert (one, all_of_them) == (1, usable_cores())


def test_batches_depend_on_nothing_but_requests():
    greedy, sampled = {"until": ["\n"]}, {"do_sample": True}
    requests = [("bb", greedy), ("a", sampled), ("cccc", greedy), ("aa", greedy), ("ddd", sampled), ("a", greedy)]
    batches = generation_batches(requests, 2, list)  # type: ignore[arg-type]
    assert batches == [[2, 3], [0, 5], [4, 1]]


def test_contexts_are_cut_from_the_left():
    assert fitted((None, [1, 2, 3], [4, 5]), 4) == (None, [1, 2, 3], [4, 5])
    assert fitted((None, [1, 2, 3], [4, 5]), 2) == (None, [3], [4, 5])
    with pytest.raises(QDeltaNetError, match="a target of 3 tokens does not fit the model's 2"):
        fitted((None, [1], [2, 3, 4]), 2)
