"""Settings of every test: offline, few threads, and property tests that repeat themselves exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

THREADS = 2
# On tensors this small a second thread costs more than it gives, many times so on a machine that is busy.
SINGLE = {"core", "inverse", "delta_rule", "backends"}
torch.set_num_threads(THREADS)

settings.register_profile(
    "qdeltanet",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("qdeltanet")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(1 if request.path.parent.name in SINGLE else THREADS)
    yield
    torch.set_num_threads(THREADS)
