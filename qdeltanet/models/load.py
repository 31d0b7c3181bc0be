"""Load models and tokenizers by hub id or directory, with one-line errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..backends import check_device
from ..core import QDeltaNetError, unknown
from .check import check_files, check_loaded, quiet_report

DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(name: str, dtype: str = "float32", device: str = "cpu", **kwargs: Any) -> Any:
    """A causal language model in evaluation mode. name: hub id or directory; only safetensors are read.

    dtype: of all weights, whatever the files mix; `auto` takes the one that the config names (float32 tensors of a
    bfloat16 model are rounded then, as transformers does). kwargs: for `from_pretrained`. With a device_map (`auto`, or
    modules to devices; max_memory and offload_folder beside it) accelerate places the weights, and device is not used.
    Raises QDeltaNetError if it cannot be found or read, does not fit its config, or this machine lacks the device.
    """
    check_device(device)
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if Path(name).is_dir():
        check_files(Path(name))
    kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = None  # a pair, which transformers' types do not say
    try:
        with quiet_report():
            loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
    except QDeltaNetError:
        raise
    except Exception as e:  # transformers, hub and safetensors each have their own
        raise QDeltaNetError(explain("model", name, e)) from e
    model, info = loaded
    check_loaded(name, model, info)
    return model.eval() if kwargs.get("device_map") is not None else model.eval().to(device)


def load_tokenizer(name: str) -> Any:
    """Raises QDeltaNetError if it cannot be found or read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as e:
        raise QDeltaNetError(explain("tokenizer of", name, e)) from e


def vocabulary_size(name: str) -> int:
    """Of the model, from its config alone. Raises QDeltaNetError if that cannot be found or read."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(name).get_text_config().vocab_size)
    except Exception as e:
        raise QDeltaNetError(explain("model", name, e)) from e


def explain(what: str, name: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not Path(name).exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            return f"{what} {name!r}: no such directory"
        return f"{what} {name!r}: no such directory, and from the hub: {first}"
    return f"{what} {name!r}: {first}"
