"""A task ships only if a shipped model's float score is well above chance; and breaking the inverse must show."""

from __future__ import annotations

import pytest

from qdeltanet.eval.evaluate import Row, evaluate
from qdeltanet.eval.task_files import load_tasks
from qdeltanet.recipe import load_recipe

# The float score of tiny-recall on the first documents, measured; chance is 1/32.
LEAST = {
    "recall_4x64": 0.97,
    "recall_8x128": 0.97,
    "recall_16x512": 0.97,
    "recall_24x256": 0.9,
    "recall_32x128": 0.75,
    "needle_000": 0.97,
    "needle_050": 0.97,
    "needle_100": 0.97,
    "copying": 0.9,
}


@pytest.fixture(scope="module")
def rows():
    asked = [Row("float", execution="float"), Row("T=I", load_recipe("float", ["inverse.method=identity"]))]
    return evaluate("tiny-recall", asked, ["recall_sizes", "needle", "copying"], limit=16)


def test_tags_stand_for_their_tasks():
    assert set(load_tasks(["recall_sizes", "needle", "copying"], 1).names) == set(LEAST)


@pytest.mark.parametrize("task", LEAST)
def test_float_is_far_above_chance(rows, task):
    exact, broken = (row["tasks"][task] for row in rows)
    assert exact["acc"]["value"] >= LEAST[task] > 10 / 32
    assert exact["nll"]["value"] < broken["nll"]["value"]
