"""`qdeltanet bench layerwise`: the memory in which a model of which one layer fits is calibrated."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoint import load_calibration
from ...core import QDeltaNetError
from ...models import StreamedModel, quantize_model, quantized_layers
from ...recipe import Recipe
from ..embedded import model_path
from ..make_model import make_model

EVERY = 0.02  # seconds between two looks at a process
MIB = 2**20


@dataclass
class Peaks:
    """Of one process, in bytes. anonymous, mapped: the largest that any look at its /proc/PID/status found (RssAnon;
    RssFile + RssShmem, pages of files that the kernel may drop at any time). resident: the kernel's own peak of both
    together since the program started (VmHWM; ru_maxrss would count its parent's). scratch: files in its state folder,
    as allocated. layers: seconds at which each was finished.
    """

    anonymous: int = 0
    mapped: int = 0
    resident: int = 0
    scratch: int = 0
    seconds: float = 0.0
    looks: int = 0
    layers: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """MiB and seconds; of layers the time that each took."""
        took = [round(b - a, 2) for a, b in zip([0.0, *self.layers], self.layers, strict=False)]
        sizes = {f"{k}_mib": round(getattr(self, k) / MIB, 1) for k in ("anonymous", "mapped", "resident", "scratch")}
        return {**sizes, "seconds": round(self.seconds, 1), "looks": self.looks, "layer_seconds": took}


@dataclass(frozen=True)
class Settings:
    """What the measured command calibrates. Sequences are of the embedded set `bytes`."""

    recipe: str = "int8"
    samples: int = 4
    seq_len: int = 512
    batch_size: int = 1
    dtype: str = "bfloat16"
    threads: int = 2

    def command(self, model: str, output: Path, *more: str) -> list[str]:
        """A fresh process that calibrates."""
        options = {
            "recipe": self.recipe, "dataset": "bytes", "samples": self.samples, "seq-len": self.seq_len,
            "batch-size": self.batch_size, "dtype": self.dtype, "threads": self.threads, "output": output,
        }  # fmt: skip
        given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        return [sys.executable, "-m", "qdeltanet", "calibrate", model, *given, "--quiet", *more]


def layerwise_bench(
    model: str | None, recipe: Recipe, settings: Settings, folder: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Calibrate a model layer by layer in a fresh process, and watch that process.

    model: None makes random weights of the shape qwen3.5-1.5b with a vocabulary of 32,000. recipe: that of settings.
    folder: where model and scratch stand meanwhile, None is the system's temporary folder. Raises QDeltaNetError if the
    command fails, or without /proc (this is Linux's).
    """
    if not Path("/proc/self/status").exists():
        raise QDeltaNetError("bench layerwise reads /proc/PID/status, which this system does not have")
    with tempfile.TemporaryDirectory(prefix="qdeltanet-layerwise-", dir=folder) as made:
        scratch = Path(made)
        if model is None:
            say("making random weights: qwen3.5-1.5b, vocabulary 32,000")
            model = str(scratch / "model")
            make_model(Path(model), "qwen3.5-1.5b", dtype=settings.dtype)
        path, output = model_path(model), scratch / "calibration"
        say("calibrating layer by layer")
        peaks = watch(settings.command(model, output, "--layerwise"), scratch / f".{output.name}.calibrating")
        whole, how = complete(path, recipe, output, settings.dtype)
        say("comparing with the ordinary pass on tiny-hybrid")
        equal = equals_ordinary(settings, scratch)
        size = checkpoint_size(path)
    return {
        **peaks.as_dict(),
        "model_mib": round(size / MIB, 1) if size else None,
        "verified": whole and equal,
        "how": f"{how}; on tiny-hybrid {'equal to' if equal else 'DIFFERENT from'} the ordinary pass, every byte",
    }


def watch(command: Sequence[str], state: Path) -> Peaks:
    """Run a command and look at its memory and state folder every 20 ms. Raises QDeltaNetError if it fails."""
    found, start = Peaks(), time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while True:
            _look(found, process.pid, state, time.monotonic() - start)
            if process.poll() is not None:
                break
            time.sleep(EVERY)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if process.returncode:
        raise QDeltaNetError(f"calibrate ended with {process.returncode}: {(said.splitlines() or ['no reason'])[-1]}")
    found.seconds = time.monotonic() - start
    return found


def _look(found: Peaks, pid: int, state: Path, now: float) -> None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        files = [(p.name, p.stat().st_blocks * 512) for p in state.iterdir()] if state.is_dir() else []
    except OSError:  # it ended, or renamed a file, just now
        return
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Rss", "VmHWM"))}
    found.looks += 1
    found.anonymous = max(found.anonymous, kib.get("RssAnon", 0) * 1024)
    found.mapped = max(found.mapped, (kib.get("RssFile", 0) + kib.get("RssShmem", 0)) * 1024)
    found.resident = max(found.resident, kib.get("VmHWM", 0) * 1024)
    found.scratch = max(found.scratch, sum(size for _, size in files))
    finished = sum(name.startswith("finished-") for name, _ in files)
    found.layers += [now] * (finished - len(found.layers))


def complete(path: str, recipe: Recipe, output: Path, dtype: str) -> tuple[bool, str]:
    """Whether the scales that the model needs are there, and no others. Reading checks that they are finite."""
    model = StreamedModel(path, dtype).model
    quantize_model(model, recipe)
    wanted = set()
    for layer in quantized_layers(model).values():
        keys = () if layer.delta_net is None else layer.delta_net.scales.keys
        static = [f"{name}.input_scale" for name, p in layer.projections.items() if p.is_static]
        wanted |= {layer.prefix + key for key in (*keys, *static)}
    found = load_calibration(output).scales.keys()
    return found == wanted, f"{len(wanted & found)} of {len(wanted)} scales there and finite"


def equals_ordinary(settings: Settings, scratch: Path) -> bool:
    """Whether both ways write the same files for a small model."""
    contents = []
    for name, more in (("ordinary", ()), ("layerwise", ("--layerwise",))):
        watch(settings.command("tiny-hybrid", scratch / name, *more), scratch / f".{name}.calibrating")
        contents.append({path.name: path.read_bytes() for path in (scratch / name).iterdir()})
    return contents[0] == contents[1]


def checkpoint_size(path: str) -> int:
    """Bytes of the safetensors files of a directory; 0 for a hub id."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
