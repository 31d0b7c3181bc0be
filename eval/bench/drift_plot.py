"""The picture of docs/long-context.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..._pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, png
from ...core.files import write_bytes
from .drift import MODES, Row

TITLES = {"chunks": "prefill in chunks", "decode": "decode, state requantized at every token"}
KEYS = {"output_median": "relative error of output", "state_median": "relative error of state"}
# A colour per way to hold the codes, dashed with feedback.
COLOURS = {"float": GREY, "int16": GREEN, "int8": ORANGE, "int8 channel": BLUE, "int8 step": PURPLE}
CARRIED = "#000000"


def plot_drift(rows: Sequence[Row], path: Path) -> None:
    """Error against position, median over heads: a column per mode that was run, output above state."""
    modes = [m for m in MODES if any(r["mode"] == m for r in rows)]
    figure = new_figure(5 * len(modes) + 0.5, 7)
    grid = figure.subplots(2, len(modes), squeeze=False, sharex=True, sharey="row")
    for i, (key, label) in enumerate(KEYS.items()):
        for axes, mode in zip(grid[i], modes, strict=True):
            for state in dict.fromkeys(r["state"] for r in rows):
                own = [r for r in rows if (r["state"], r["mode"]) == (state, mode)]
                colour = COLOURS.get(state.removesuffix(" feedback"), CARRIED)
                style = "--" if state.endswith("feedback") else ":" if colour == CARRIED else "-"
                axes.plot([r["position"] for r in own], [r[key] for r in own], style, color=colour, lw=1.4, label=state)
            axes.set(xscale="log", yscale="log", title=TITLES[mode] if i == 0 else "", xlabel="tokens" if i else "")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.grid(alpha=0.3, which="both")
        grid[i][0].set_ylabel(label)
    grid[0][0].legend(fontsize=7, ncols=2)
    write_bytes(path, png(figure))
