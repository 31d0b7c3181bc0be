"""Models and processes that several test folders share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads stall a busy machine

import pytest
import torch


@pytest.fixture(scope="session")
def random_model() -> Callable[[], Any]:
    """Factory of one random Qwen3.5 hybrid: 3 linear_attention + 1 full_attention, 2 key / 4 value heads of 32."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    def make() -> Any:
        torch.manual_seed(0)
        config = Qwen3_5TextConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            tie_word_embeddings=True,
        )
        return Qwen3_5ForCausalLM(config).eval()

    return make


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Any]:
    """Starts processes of the command, whose output goes to `tmp_path / "logs"`; they end with the test."""
    from fleet import Fleet

    (tmp_path / "logs").mkdir()
    made = Fleet(tmp_path / "logs")
    yield made
    made.end()
