"""Load models and tokenizers by hub id or directory, with one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..backends import check_device
from ..core import QDeltaNetError, unknown

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(name: str, dtype: str = "float32", device: str = "cpu", **kwargs: Any) -> Any:
    """A causal language model in evaluation mode. name: hub id or directory; only safetensors are read.

    Raises QDeltaNetError if it cannot be found or read, or this machine lacks the device.
    """
    check_device(device)
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **kwargs)
    except QDeltaNetError:
        raise
    except Exception as e:  # transformers, hub and safetensors each have their own
        raise QDeltaNetError(_explain("model", name, e)) from e
    placed: Any = model.eval()
    return placed.to(device)


def load_tokenizer(name: str) -> Any:
    """Raises QDeltaNetError if it cannot be found or read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as e:
        raise QDeltaNetError(_explain("tokenizer of", name, e)) from e


def _explain(what: str, name: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not Path(name).exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            return f"{what} {name!r}: no such directory"
        return f"{what} {name!r}: no such directory, and from the hub: {first}"
    return f"{what} {name!r}: {first}"
