"""The training loop that both embedded models share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORE = -100
WARMUP_STEPS = 20
DECAY_FROM = 0.6
REPORT_EVERY = 25


class Task(Protocol):
    """Where batches come from."""

    def batch(self, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, T] and next-token targets [B, T] (IGNORE: not scored) at `progress` in [0, 1)."""

    def observe(self, accuracy: float) -> None:
        """Told the share of scored targets that the model got right in the batch just drawn."""


def fit(
    model: PreTrainedModel,
    task: Task,
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    report: Callable[[str], None] = print,
) -> list[float]:
    """Trains `model` in place; warms up, holds and then lowers the learning rates linearly to zero.

    Returns:
        The loss of every step (mean cross-entropy in nats over scored targets).

    Raises:
        FloatingPointError: as soon as a loss is not finite.
    """
    model.train()
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, steps)) for o in optimizers]
    losses, started = [], time.monotonic()
    for step in range(steps):
        loss, accuracy = _step(model, *task.batch(step / steps), optimizers)
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(f"the loss of step {step} is {loss}")
        task.observe(accuracy)
        losses.append(loss)
        for schedule in schedules:
            schedule.step()
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            report(f"step {step + 1:4d}/{steps}  loss {loss:.4f}  accuracy {accuracy:.3f}  {seconds:.0f} s")
    model.eval()
    return losses


def _step(
    model: PreTrainedModel, tokens: torch.Tensor, targets: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[float, float]:
    """One update; the loss and the accuracy before it."""
    scored = targets != IGNORE
    logits = model(input_ids=tokens, use_cache=False).logits[scored]
    loss = F.cross_entropy(logits.float(), targets[scored])
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item(), (logits.argmax(-1) == targets[scored]).float().mean().item()


def _rate(step: int, steps: int) -> float:
    """Factor on the learning rates at `step`."""
    held = min(1.0, (step + 1) / WARMUP_STEPS)
    return held * min(1.0, max(0.0, (steps - step) / (steps * (1 - DECAY_FROM))))


def slow_gates(model: PreTrainedModel, time_steps: Sequence[float]) -> None:
    """Sets the decay of every linear-attention head: at a zero gate input, log decay g is minus its time step.

    The usual initialisation forgets within a token (g near -10), which leaves nothing for the delta rule's inverse to
    do; heads of trained models hardly decay.
    """
    dt_bias = torch.log(torch.expm1(torch.tensor(time_steps)))  # inverse of softplus
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("linear_attn.A_log"):
                parameter.zero_()
            elif name.endswith("linear_attn.dt_bias"):
                parameter.copy_(dt_bias)


def is_gate(name: str) -> bool:
    """Whether a parameter makes the decay; these learn at a tenth of the rate, so that slow heads stay slow."""
    return name.endswith(("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.in_proj_a.weight"))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path, dtype: torch.dtype) -> None:
    """Writes a model directory that `AutoModelForCausalLM` and `AutoTokenizer` load; weights and config in `dtype`."""
    torch.nn.Module.to(model, dtype)
    model.config.dtype = dtype
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)  # safetensors creates it readable by its owner only
    tokenizer.save_pretrained(output)
