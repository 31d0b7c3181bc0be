"""tiny-recall: two linear-attention layers, 122,512 parameters, trained on multi-query associative recall."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from ..recall_task import recall_sequence
from .loop import IGNORE, fit, is_gate, save, slow_gates
from .tokenizers import EOS, FIRST_KEY, FIRST_VALUE, PAD, RECALL_VOCABULARY, recall_tokenizer

STEPS = 700
BATCH = 64
SHORT, LONG = 64, 128
LONG_FROM = 0.6
MAX_PAIRS = 16
LEARNING_RATE = 5e-3
TIME_STEPS = (5e-4, 0.05, 3e-3, 0.5)


def recall_config() -> Qwen3_5TextConfig:
    """The architecture of tiny-recall. Without full attention a cached forward raises: `use_cache` is off."""
    return Qwen3_5TextConfig(
        vocab_size=RECALL_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def recall_batch(rng: random.Random, batch: int, pairs: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of the recall task as tensors.

    Returns:
        tokens [B, T] and next-token targets [B, T]: the value at the T/2 - P positions of query keys, elsewhere -100.

    Raises:
        ValueError: if the pairs do not fit.
    """
    pairs_of_words = torch.tensor([recall_sequence(rng, pairs, length) for _ in range(batch)])  # [B, 2, T/2]
    tokens = (pairs_of_words + torch.tensor([[FIRST_KEY], [FIRST_VALUE]])).transpose(1, 2).reshape(batch, length)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2 * pairs :: 2] = tokens[:, 2 * pairs + 1 :: 2]
    return tokens, targets


class RecallTask:
    """Four pairs first; twice as many as soon as a running accuracy passes 95%; sequences of 128 tokens at the end."""

    def __init__(self, seed: int, batch: int = BATCH) -> None:
        self.rng = random.Random(seed)
        self.sequences = batch
        self.pairs = 4
        self.accuracy = 0.0

    def batch(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, [B, 64], later [B/2, 128]."""
        if progress < LONG_FROM or self.pairs < MAX_PAIRS:
            return recall_batch(self.rng, self.sequences, self.pairs, SHORT)
        return recall_batch(self.rng, self.sequences // 2, self.pairs, LONG)

    def observe(self, accuracy: float) -> None:
        """Moves the curriculum on."""
        self.accuracy += 0.2 * (accuracy - self.accuracy)
        if self.accuracy > 0.95 and self.pairs < MAX_PAIRS:
            self.pairs, self.accuracy = 2 * self.pairs, 0.0


def train_recall(output: Path, steps: int = STEPS, seed: int = 0, report: Callable[[str], None] = print) -> list[float]:
    """Trains tiny-recall and writes it to `output` in float32.

    Returns:
        The loss of every step, in nats.
    """
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(recall_config())
    slow_gates(model, TIME_STEPS)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if not is_gate(name)], "lr": LEARNING_RATE, "weight_decay": 0.1},
        {"params": [p for name, p in named if is_gate(name)], "lr": LEARNING_RATE / 10, "weight_decay": 0.0},
    ]
    losses = fit(model, RecallTask(seed), [torch.optim.AdamW(groups)], steps, report)
    save(model, recall_tokenizer(), output, torch.float32)
    return losses
