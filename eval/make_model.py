"""`python -m qdeltanet.eval.make_model`: Qwen3.5 text models of real shapes with random weights, for benchmarks.

They are written shard by shard: at no time is more than one decoder layer, or the embedding, in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core import QDeltaNetError, unknown
from ..core.files import whole_directory

# qwen3.5-0.8b has the layers of the hub's model of that name. 1.5b: the layers of the hub's 2B; with a vocabulary of
# 32,000 and an output matrix of its own, 1.50e9 parameters.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-0.8b": {"hidden_size": 1024, "intermediate_size": 3584, "tie_word_embeddings": True},
    "qwen3.5-1.5b": {"hidden_size": 2048, "intermediate_size": 6144, "tie_word_embeddings": False},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}
_COMMON = {
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
}
DTYPES = ("bfloat16", "float16", "float32")
# Hub checkpoints hold these in float32 whatever the rest is in.
_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")


def make_model(
    output: Path,
    shape: str,
    vocabulary: int = 32000,
    dtype: str = "bfloat16",
    *,
    layers: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Write config, sharded safetensors with their index, and the byte tokenizer. Returns the number of parameters.

    layers: decoder layers where not the shape's own number; every fourth is full attention. Weights are drawn as
    transformers initialises them, but with slow gates: heads that forget at once would leave the inverse nothing to do.
    Raises QDeltaNetError for an unknown shape or dtype, a vocabulary below the tokenizer's 260, and an output that is
    not empty.
    """
    from .train.tokenizers import BYTE_EOS, BYTE_PAD, BYTE_VOCABULARY, byte_tokenizer

    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if vocabulary < BYTE_VOCABULARY:
        raise QDeltaNetError(f"a vocabulary of {vocabulary} is too small: the byte tokenizer has {BYTE_VOCABULARY} ids")
    settings = {**_COMMON, **SHAPES[shape], "vocab_size": vocabulary, "dtype": dtype}
    settings |= {"pad_token_id": BYTE_PAD, "eos_token_id": BYTE_EOS}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    with whole_directory(output, overwrite) as folder:
        parameters = _write(folder, settings, seed)
        byte_tokenizer().save_pretrained(folder)
    return parameters


def _write(folder: Path, settings: dict[str, Any], seed: int) -> int:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**settings, architectures=["Qwen3_5ForCausalLM"])
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config).to(getattr(torch, settings["dtype"]))
    parts = list(_parts(model))
    weights: dict[str, str] = {}
    size = parameters = 0
    for number, (prefix, part) in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {f"{prefix}.{name}": tensor for name, tensor in _initialised(model, part, seed + number).items()}
        save_file(tensors, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors creates it readable by its owner only
        weights |= dict.fromkeys(tensors, file)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        parameters += sum(t.numel() for t in tensors.values())
        part.to("meta")
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(folder)
    return parameters


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """What becomes a shard, by its name in the model."""
    yield "model.embed_tokens", model.model.embed_tokens
    for index, layer in enumerate(model.model.layers):
        yield f"model.layers.{index}", layer
    yield "model.norm", model.model.norm
    if not model.config.tie_word_embeddings:
        yield "lm_head", model.lm_head


def _initialised(model: Any, part: Any, seed: int) -> dict[str, Any]:
    """A part's tensors, drawn as transformers would, but for the gates: time steps from 5e-4 to 0.5 over the heads."""
    import torch

    from .train.loop import slow_gates

    part.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part.apply(model._init_weights)
    steps = torch.logspace(-3.3, -0.3, model.config.linear_num_value_heads).tolist()
    slow_gates(part, steps)
    return {k: v.float() if k.endswith(_FLOAT32) else v for k, v in part.state_dict().items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m qdeltanet.eval.make_model",
        description="Write a Qwen3.5 text model with random weights, shard by shard.",
        epilog="example: python -m qdeltanet.eval.make_model --shape qwen3.5-1.5b --output build/random-1.5b",
    )
    made.add_argument("--shape", choices=list(SHAPES), required=True, help="whose layers it has")
    made.add_argument("--vocab", type=int, default=32000, metavar="N", help="size of the vocabulary (default: 32000)")
    made.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: the shape's)")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the weights (default: 0)")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write it")
    made.add_argument("--overwrite", action="store_true", help="replace a directory that is not empty")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Writes the model; 0 done, 2 the request was wrong."""
    asked = parser().parse_args(arguments)
    try:
        parameters = make_model(
            asked.output,
            asked.shape,
            asked.vocab,
            asked.dtype,
            layers=asked.layers,
            seed=asked.seed,
            overwrite=asked.overwrite,
        )
    except QDeltaNetError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"wrote {asked.output}: {parameters:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
