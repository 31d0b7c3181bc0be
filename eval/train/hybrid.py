"""tiny-hybrid: three linear-attention layers and one of full attention, a language model of bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from .corpus import split
from .loop import fit, is_gate, save, slow_gates
from .muon import Muon
from .tokenizers import BYTE_EOS, BYTE_PAD, BYTE_VOCABULARY, byte_tokenizer

STEPS = 700
BATCH = 8
SHORT, LONG = 512, 1024
LONG_FROM = 0.7
MATRIX_RATE = 0.02
LEARNING_RATE = 4e-3
TIME_STEPS = (5e-4, 0.05, 3e-3, 0.5)


def hybrid_config() -> Qwen3_5TextConfig:
    """The architecture of tiny-hybrid: every kind of layer of the real family, small."""
    return Qwen3_5TextConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=BYTE_PAD,
        eos_token_id=BYTE_EOS,
    )


class ByteTask:
    """Random crops of the training text, each after an end-of-text token as in evaluation; longer ones at the end."""

    def __init__(self, texts: list[str], seed: int, batch: int = BATCH) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sequences = batch
        stream: list[int] = []
        for text in texts:
            stream += [BYTE_EOS, *text.encode()]
        self.stream = torch.tensor(stream)

    def batch(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, [B, 512], later [B/2, 1024]."""
        length = SHORT if progress < LONG_FROM else LONG
        count = self.sequences * SHORT // length
        start = torch.randint(len(self.stream) - length, (count, 1), generator=self.generator)
        tokens = self.stream[start + torch.arange(length)]
        inputs = torch.cat([torch.full((count, 1), BYTE_EOS), tokens[:, :-1]], dim=1)
        return inputs, tokens

    def observe(self, accuracy: float) -> None:
        """Nothing depends on the accuracy."""


def optimizers(model: Qwen3_5ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers, AdamW on embeddings, norms, convolutions and gates."""
    named = list(model.named_parameters())
    matrices = [name for name, p in named if p.ndim == 2 and "layers" in name and ".in_proj_a" not in name]
    matrices = [name for name in matrices if ".in_proj_b" not in name]
    rest = [p for name, p in named if name not in matrices and not is_gate(name)]
    groups = [
        {"params": rest, "lr": LEARNING_RATE, "weight_decay": 0.0},
        {"params": [p for name, p in named if is_gate(name)], "lr": LEARNING_RATE / 10, "weight_decay": 0.0},
    ]
    muon = Muon([p for name, p in named if name in matrices], lr=MATRIX_RATE, weight_decay=0.01)
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95))]


def train_hybrid(output: Path, steps: int = STEPS, seed: int = 0, report: Callable[[str], None] = print) -> list[float]:
    """Trains tiny-hybrid on the documentation of this Python and writes it to `output` in bfloat16.

    Returns:
        The loss of every step, in nats per byte.

    Raises:
        RuntimeError: if this Python carries too little documentation.
    """
    torch.manual_seed(seed)
    train, _ = split()
    model = Qwen3_5ForCausalLM(hybrid_config())
    slow_gates(model, TIME_STEPS)
    losses = fit(model, ByteTask(train, seed), optimizers(model), steps, report)
    save(model, byte_tokenizer(), output, torch.bfloat16)
    return losses
