"""Results of `evaluate` as rows of a table, for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]

# A rolling task's metrics are shown as the perplexities that they stand for.
_PERPLEXITY = {"nats_per_byte": "ppl/byte", "nats_per_word": "ppl/word"}


def entries(rows: Rows, tasks: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """One flat dictionary per task, row and metric; None where there is nothing. Perplexities replace their rates.

    tasks: those wanted, in this order; None for all that the rows have.
    """
    for task in dict.fromkeys(t for row in rows for t in row["tasks"]) if tasks is None else tasks:
        for i, row in enumerate(rows):
            metrics = row["tasks"].get(task, {})
            for metric, m in metrics.items():
                if metric == "nats_per_word" and "nll" in metrics:
                    continue  # of `bytes`, whose words are no measure
                yield {"baseline": i == 0, **_entry(task, row, metric, m)}


def _entry(task: str, row: Mapping[str, Any], metric: str, m: Mapping[str, Any]) -> dict[str, Any]:
    base, _, kind = metric.partition(",")
    ratio = "perplexity_ratio" if "perplexity" in m else None
    low, high = m.get(f"{ratio or 'difference'}_interval", (None, None))
    logits = row["logits"].get(task, {})
    kl_low, kl_high = logits.get("kl_interval", (None, None))
    return {
        "task": task,
        "row": row["name"],
        "execution": row["execution"],
        "metric": ",".join([_PERPLEXITY.get(base, base), *([kind] if kind else [])]),
        "documents": m["documents"],
        "value": m["perplexity"] if ratio else m["value"],
        "stderr": m["perplexity"] * m["stderr"]
        if ratio and None not in (m["perplexity"], m["stderr"])
        else m["stderr"],
        "compared": "ratio" if ratio else "difference",
        "paired": m.get(ratio or "difference"),
        "paired_stderr": m.get(f"{ratio or 'difference'}_stderr"),
        "paired_low": low,
        "paired_high": high,
        "kl": logits.get("kl"),
        "kl_low": kl_low,
        "kl_high": kl_high,
        "top1": logits.get("top1"),
        "scored_tokens": logits.get("tokens"),
        "clipped": row["saturated"],
        "tokens_per_second": row["tokens_per_second"],
        "generated_per_second": row["generated_per_second"],
        "seconds": row["seconds"],
        "cached": row["cached"],
        "weights": row["hashes"].get("weights"),
        "arithmetic": row["hashes"].get("arithmetic"),
        "recipe": row["recipe_fingerprint"],
        "calibration": row["hashes"].get("calibration"),
    }


def csv_text(results: Mapping[str, Any]) -> str:
    """Every figure in full, one line per task, row and metric, each with what it was made by."""
    made = {
        "model": results["model"],
        "device": results["device"],
        "threads": results["threads"],
        "processes": results["processes"],
        "settings": json.dumps(results["settings"]),
        "versions": _versions(results),
        "command": _command(results),
    }
    lines = [{**entry, **made} for entry in entries(results["rows"])]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else list(made), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def markdown_text(results: Mapping[str, Any]) -> str:
    """A table per task, ready for a paper or a README, then how it was made."""
    parts = [f"# {results['model']}\n"]
    tasks = dict.fromkeys([*results["tasks"], *(t for row in results["rows"] for t in row["tasks"])])
    for task in tasks:
        lines = list(entries(results["rows"], [task]))
        if lines:
            parts.append(_markdown_table(task, lines, results["rows"][0]["name"]))
    note = (
        "± is one standard error; [] are 95% intervals of the bootstrap over documents (queries of one sequence "
        "together, where ± counts queries); KL in nats per scored token."
    )
    parts.append("\n".join([note, "", *(f"- {line}" for line in _provenance(results)), ""]))
    return "\n".join(parts)


def _markdown_table(task: str, lines: Sequence[Mapping[str, Any]], baseline: str) -> str:
    heads = ("recipe", "run", "metric", "value", f"to {baseline}, paired", "KL", "top-1", "clipped", "tokens/s")
    made = [f"## {task}, {lines[0]['documents']:,} documents\n", _row(heads), _row(["---"] * len(heads))]
    before = None
    for e in lines:
        change = f"{change_text(e)} {change_interval(e)}".strip()
        of_row = (kl_text(e), top1_text(e), f"{e['clipped']:,}", speed_text(e))  # said once
        once = of_row if (e["row"], e["execution"]) != before else [""] * len(of_row)
        made.append(_row([e["row"], e["execution"], e["metric"], value_text(e), change, *once]))
        before = e["row"], e["execution"]
    return "\n".join([*made, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"


def _provenance(results: Mapping[str, Any]) -> list[str]:
    """Command, versions and hashes."""
    rows = [
        f"{row['name']}: " + ", ".join(f"{k} {v[:12]}" for k, v in row["hashes"].items() if v)
        for row in results["rows"]
    ]
    place = f"{results['device']}, {results['threads']} threads, {results['processes']} processes"
    return [
        f"command: `{_command(results)}`",
        f"versions: {_versions(results)}; {place}",
        f"settings: `{json.dumps(results['settings'])}`",
        *(f"hashes of {row}" for row in rows),
    ]


def _command(results: Mapping[str, Any]) -> str:
    return shlex.join(["qdeltanet", *results["command"]])


def _versions(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def value_text(e: Mapping[str, Any]) -> str:
    return (_number(e["value"], ".4f") or "not finite") + _number(e["stderr"], ".4f", " ±")


def change_text(e: Mapping[str, Any]) -> str:
    """Against the baseline: a difference with its standard error, or the ratio of two perplexities."""
    if e["baseline"] or e["paired"] is None:
        return ""
    shown = f"x {e['paired']:.4f}" if e["compared"] == "ratio" else f"{e['paired']:+.4f}"
    return shown + _number(e["paired_stderr"], ".4f", " ±")


def change_interval(e: Mapping[str, Any]) -> str:
    return "" if e["baseline"] else interval_text(e["paired_low"], e["paired_high"])


def interval_text(low: float | None, high: float | None, form: str = ".4f") -> str:
    return "" if low is None or high is None or math.isnan(low) else f"[{low:{form}}, {high:{form}}]"


def kl_text(e: Mapping[str, Any], with_interval: bool = True) -> str:
    interval = interval_text(e["kl_low"], e["kl_high"], ".1e") if with_interval else ""
    return f"{_number(e['kl'], '.2e')} {interval}".strip()


def speed_text(e: Mapping[str, Any]) -> str:
    """Tokens per second in the model: scored ones, or where nothing is scored, generated ones."""
    speed = e["generated_per_second"] if e["tokens_per_second"] is None else e["tokens_per_second"]
    return _number(speed, ",.0f")


def top1_text(e: Mapping[str, Any]) -> str:
    return _number(e["top1"], ".4f")


def _number(value: float | None, form: str, before: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{before}{value:{form}}"


def finite(content: Any) -> Any:
    """Plain data with null for what JSON has no number for."""
    if isinstance(content, Mapping):
        return {str(k): finite(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
