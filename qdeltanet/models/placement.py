"""Models that accelerate has spread over devices, memory and disk (`device_map`): weights come and go by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def materialised(module: nn.Module, recurse: bool = True) -> Iterator[None]:
    """Within, the weights of a module (and of all below it) are in memory, on the device where they execute.

    Read `module.weight` inside, not before: it is another tensor then. Changes to it are lost at the end.
    """
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for part in module.modules() if recurse else (module,):
            if hasattr(part, "_hf_hook"):
                stack.enter_context(align_module_device(part))
        yield


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes. Its weights are elsewhere (`meta`) as long as they are offloaded.

    For a whole model: where its tokens go.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if device is None else torch.device(device)


def take_over_hook(old: nn.Module, new: nn.Module) -> None:
    """The hook that brings the weights of `old` now brings those of `new`, under the same names."""
    hook: Any = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
