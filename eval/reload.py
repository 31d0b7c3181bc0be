"""What a fresh process sees of an exported checkpoint: `python -m qdeltanet.eval.reload CKPT LOGITS RESULT [LIMIT]`.

LOGITS is a safetensors file with `tokens` and the in-memory model's `logits`; RESULT is the JSON file to write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_logits(model: Any, tokens: Tensor, path: Path) -> None:
    """Keep tokens [B, T] and the model's logits [B, T, vocabulary] for comparison."""
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    save_file({"tokens": tokens.contiguous(), "logits": logits.contiguous()}, path)


def reload(checkpoint: str, logits: Path, limit: int | None) -> dict[str, Any]:
    """Load with `import qdeltanet` and transformers alone, compare bits, and evaluate recall again."""
    from transformers import AutoModelForCausalLM

    kept = load_file(logits)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        again = model(input_ids=kept["tokens"], use_cache=False).logits
    equal = again.dtype == kept["logits"].dtype and torch.equal(again, kept["logits"])

    from .evaluate import Row, evaluate

    row = evaluate(checkpoint, [Row("export", model=checkpoint)], ["recall"], limit=limit)[0]
    recall = row["tasks"]["recall"]
    return {"reload_equal": equal, "accuracy": recall["acc"]["value"], "nll": recall["nll"]["value"]}


def main() -> None:
    checkpoint, logits, result, *rest = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    found = reload(checkpoint, Path(logits), int(rest[0]) if rest else None)
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
