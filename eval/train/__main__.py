"""The command `python -m qdeltanet.eval.train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  python -m qdeltanet.eval.train tiny-recall --output build/tiny-recall     (two to three minutes on two cores)
  python -m qdeltanet.eval.train tiny-hybrid --output build/tiny-hybrid --steps 20     (a trial of the set-up)
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m qdeltanet.eval.train",
        description="Train an embedded model again, deterministically for a seed, version of torch and machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", choices=["tiny-recall", "tiny-hybrid"])
    made.add_argument("--output", type=Path, metavar="DIR", help="where to write it (default: build/MODEL)")
    made.add_argument("--steps", type=int, metavar="N", help="training steps (default: as the shipped model)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="seed of weights and data (default: 0)")
    made.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Trains and saves; 0 done, 1 the training failed, 2 the request was wrong."""
    asked = parser().parse_args(arguments)
    output = asked.output or Path("build") / asked.model
    if asked.steps is not None and asked.steps < 1:
        return _complain(2, f"--steps {asked.steps}: at least one step is needed")
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not asked.overwrite:
        return _complain(2, f"{output} is not empty: choose another --output or add --overwrite")
    try:
        _train(asked.model, output, asked.steps, asked.seed)
    except KeyboardInterrupt:
        return _complain(1, "interrupted; nothing was written")
    except (RuntimeError, FloatingPointError, OSError) as error:
        return _complain(1, str(error))
    print(f"wrote {output}")
    return 0


def _train(name: str, output: Path, steps: int | None, seed: int) -> None:
    """Runs one training; the imports are here so that --help is quick."""
    from .hybrid import STEPS as HYBRID_STEPS
    from .hybrid import train_hybrid
    from .recall import STEPS as RECALL_STEPS
    from .recall import train_recall

    def report(line: str) -> None:
        print(line, flush=True)

    if name == "tiny-recall":
        train_recall(output, steps or RECALL_STEPS, seed, report)
    else:
        train_hybrid(output, steps or HYBRID_STEPS, seed, report)


def _complain(code: int, message: str) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
