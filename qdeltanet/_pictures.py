"""What pictures share: a figure, its PNG, and colours; matplotlib is imported only here, and only when one is drawn."""

from __future__ import annotations

from io import BytesIO
from typing import Any

# Okabe and Ito's palette: told apart by the colour-blind, and in grey by the markers beside them.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"


def new_figure(width: float, height: float, dpi: int = 120) -> Any:
    """A matplotlib Figure of inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=dpi)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """Its PNG, without the date and version that would make two runs differ."""
    data = BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
