"""Kept answers: never served to another recipe, calibration, execution or weights; lm-eval's own keys would be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import ENV

from qdeltanet.core import QDeltaNetError
from qdeltanet.eval.cache import Cache, calibration_digest, executed_digest, tensors_digest
from qdeltanet.eval.embedded import model_path
from qdeltanet.eval.evaluate import Row, evaluate
from qdeltanet.eval.lm import QDeltaNetLM
from qdeltanet.eval.prepare import prepare_model
from qdeltanet.eval.task_files import load_tasks, task_manager
from qdeltanet.models import load_model, load_tokenizer, set_execution
from qdeltanet.recipe import load_recipe

EXACT, BROKEN = load_recipe("float"), load_recipe("float", ["inverse.method=identity"])
DOCUMENTS = 64


def by_lm_eval(recipe: Any, cache: Path) -> float:
    """Recall of tiny-recall under a recipe, by lm-eval's own model class, its answers kept by lm-eval's own keys."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(model_path("tiny-recall"))
    runner = HFLM(prepare_model("tiny-recall", recipe), tokenizer=tokenizer, batch_size=DOCUMENTS, max_length=2048)
    done: Any = lm_eval.simple_evaluate(
        runner, tasks=["recall"], limit=DOCUMENTS, task_manager=task_manager(), bootstrap_iters=0, use_cache=str(cache)
    )
    return float(done["results"]["recall"]["acc,none"])


def by_us(recipe: Any, cache: Path) -> float:
    row = evaluate("tiny-recall", [Row("row", recipe)], ["recall"], limit=DOCUMENTS, cache=cache)[0]
    return float(row["tasks"]["recall"]["acc"]["value"])


@pytest.mark.parametrize("measure", [by_us, pytest.param(by_lm_eval, marks=pytest.mark.xfail(strict=True))])
def test_second_recipe_is_not_served_the_firsts_answers(measure, tmp_path):
    """Must fail on lm-eval's own key, so that passing on ours says something."""
    first = measure(EXACT, tmp_path / "cache")
    second = measure(BROKEN, tmp_path / "cache")
    assert first > 0.95
    assert second < 0.8


def test_same_request_is_served_every_bit(tmp_path):
    rows = [Row("float", execution="float"), Row("int4", load_recipe("int4"))]
    asked: dict[str, Any] = {"limit": 32, "logits": True, "cache": tmp_path / "cache"}
    made = evaluate("tiny-recall", rows, ["recall"], **asked)
    again = evaluate("tiny-recall", rows, ["recall"], **asked)
    assert [r["cached"] for r in made + again] == [False, False, True, True]
    for row in made + again:
        del row["cached"]
    assert json.dumps(made) == json.dumps(again)
    evaluate("tiny-recall", rows[1:], ["recall"], **asked)  # compared with nothing: another request
    fewer = evaluate("tiny-recall", rows, ["recall"], **{**asked, "limit": 16})
    assert [r["cached"] for r in fewer] == [False, False]
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_damaged_answers_are_made_again(tmp_path):
    cache = Cache(tmp_path)
    cache.keep({"a": 1}, [1.5])
    assert cache.find({"a": 1}) == [1.5]
    assert cache.find({"a": 2}) is None
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-9])
    assert cache.find({"a": 1}) is None


def test_digest_holds_weights_recipe_calibration_and_execution():
    int4 = prepare_model("tiny-recall", load_recipe("int4"))
    whole = executed_digest(int4)
    assert executed_digest(prepare_model("tiny-recall", load_recipe("int4"))) == whole
    set_execution(int4, "fake")
    assert executed_digest(int4)["arithmetic"] != whole["arithmetic"]
    set_execution(int4, "integer", "reference")
    assert executed_digest(int4)["arithmetic"] != whole["arithmetic"]
    exact, broken = (executed_digest(prepare_model("tiny-recall", r)) for r in (EXACT, BROKEN))
    assert exact["weights"] == broken["weights"]
    assert exact["arithmetic"] != broken["arithmetic"]
    model = load_model(model_path("tiny-recall"))
    before = executed_digest(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3  # of no concern to a calibration's fingerprint
    assert executed_digest(model)["weights"] != before["weights"]
    assert calibration_digest(None) is None
    one = {"a": torch.ones(2)}
    assert tensors_digest(one.items()) != tensors_digest({"a": torch.ones(2, dtype=torch.int32)}.items())


def test_digest_is_the_same_in_every_process():
    """Sets of a scheme have another order in each."""
    code = (
        "from qdeltanet.eval.cache import *; from qdeltanet.eval.prepare import *;"
        "from qdeltanet.eval.task_files import load_tasks;"
        "print(executed_digest(prepare_model('tiny-recall', load_recipe('int4'))), load_tasks(['recall'], 2).hashes)"
    )
    env = {**ENV, "PYTHONHASHSEED": "1"}  # this process has another
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=env)
    own = executed_digest(prepare_model("tiny-recall", load_recipe("int4"))), load_tasks(["recall"], 2).hashes
    assert done.stdout.strip() == f"{own[0]} {own[1]}", done.stderr


def test_lm_evals_own_option_belongs_to_what_wrote_first(tmp_path):
    """`--use_cache` with our model class: the same model goes on, another recipe is refused."""
    from lm_eval.api.model import CachingLM

    tokenizer = load_tokenizer(model_path("tiny-recall"))

    def kept(recipe: Any) -> Any:
        lm = QDeltaNetLM(prepare_model("tiny-recall", recipe), tokenizer=tokenizer)
        return CachingLM(lm, str(tmp_path / "answers.db"))

    kept(EXACT).dbdict.close()
    kept(EXACT).dbdict.close()
    with pytest.raises(QDeltaNetError, match="holds answers of another executed; name another file"):
        kept(BROKEN)
