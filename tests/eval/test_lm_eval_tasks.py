"""lm-eval's own tasks and a user's: groups, filters, generation, options; and one line where there is no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import run

from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.evaluate import Row, evaluate
from qdeltanet.eval.task_files import load_tasks
from qdeltanet.recipe import load_recipe

CHOICE = """\
task: {name}
custom_dataset: !function qdeltanet.eval.task_data.byte_documents
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 1
doc_to_text: "{{{{text[:{start}]}}}}"
doc_to_choice: "{{{{[text[{start}:{stop}], '#@!%']}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""
WRITE = """\
task: write
custom_dataset: !function qdeltanet.eval.task_data.byte_documents
output_type: generate_until
test_split: test
doc_to_text: "{{text[:30]}}"
doc_to_target: "{{text[30:36]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list:
  - metric: exact_match
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: same, filter: [{function: take_first}]}
"""
GROUP = """\
group: choices
task: [choice_a, choice_b]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    (made / "choice_a.yaml").write_text(CHOICE.format(name="choice_a", start=40, stop=44))
    (made / "choice_b.yaml").write_text(CHOICE.format(name="choice_b", start=60, stop=66))
    (made / "write.yaml").write_text(WRITE)
    (made / "choices.yaml").write_text(GROUP)
    return made


def test_groups_filters_and_generation(folder):
    rows = [Row("float", execution="float"), Row("int4", load_recipe("int4"))]
    asked = {"limit": 4, "batch_size": 4, "include_path": folder, "logits": True}
    _, int4 = evaluate("tiny-hybrid", rows, ["choices", "write"], **asked)
    assert set(int4["tasks"]) == {"choices", "choice_a", "choice_b", "write"}
    group, parts = int4["tasks"]["choices"]["acc"], [int4["tasks"][t]["acc"] for t in ("choice_a", "choice_b")]
    assert group["documents"] == 8
    assert group["value"] == sum(p["value"] for p in parts) / 2 > 0.5
    assert set(int4["tasks"]["write"]) == {"exact_match,first", "exact_match,same"}
    assert int4["tasks"]["write"]["exact_match,first"]["documents"] == 4
    assert int4["generated_per_second"] > 0
    assert set(int4["logits"]) == {"choices", "choice_a", "choice_b"}  # generated texts differ: nothing to compare
    assert int4["logits"]["choices"]["tokens"] == sum(int4["logits"][t]["tokens"] for t in ("choice_a", "choice_b"))


def test_options_reach_lm_eval(folder):
    rows = [Row("float", execution="float"), Row("int4", load_recipe("int4"))]
    asked = {"limit": 2, "include_path": folder, "logits": True}
    one, none = (evaluate("tiny-hybrid", rows, ["choice_a"], **asked, **more)[1] for more in ({}, {"num_fewshot": 0}))
    assert one["logits"]["choice_a"]["kl"] != none["logits"]["choice_a"]["kl"]  # the task's file says one example
    short = evaluate("tiny-hybrid", rows[:1], ["write"], **asked, gen_kwargs="max_gen_toks=1")[0]
    assert short["tasks"]["write"]["exact_match,first"]["value"] == 0  # of six bytes


def test_command_takes_them(folder, tmp_path):
    options = ["--include-path", str(folder), "--num-fewshot", "0", "--batch-size", "2", "--limit", "2"]
    file = tmp_path / "r.json"
    done = run("evaluate", "tiny-hybrid", "--tasks", "choices,bytes", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "choices" in done.stdout
    assert "--num-fewshot" not in done.stderr
    assert json.loads(file.read_text())["settings"]["num_fewshot"] == 0
    done = run("evaluate", "tiny-hybrid", "--tasks", "bytes", *options[2:], "--num-fewshot", "3")
    assert "--num-fewshot 3 does not reach bytes" in done.stderr


@pytest.mark.parametrize("task", ["wikitext", "mmlu_anatomy", "arc_easy", "gsm8k"])
def test_known_by_name_and_one_line_without_a_network(task, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    says = rf"task {task} cannot be loaded: .*its data come from the hub: unset HF_HUB_OFFLINE"
    with pytest.raises(QDeltaNetError, match=says) as e:
        load_tasks([task])
    assert "\n" not in str(e.value)


def test_mistakes(folder, tmp_path):
    with pytest.raises(QDeltaNetError, match="no such directory"):
        load_tasks(["recall"], 1, tmp_path / "nowhere")
    with pytest.raises(QDeltaNetError, match="unknown task 'choics'; did you mean"):
        load_tasks(["choics"], 1, folder)
    done = run("evaluate", "tiny-recall", "--tasks", "recall", "--batch-size", "many")
    assert (done.returncode, "--batch-size 'many'" in done.stderr) == (2, True)
