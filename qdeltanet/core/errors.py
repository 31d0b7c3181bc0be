"""Errors that a user can mend. The command prints each as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QDeltaNetError(ValueError):
    """A wrong request: the message names the thing and the mend."""


class BindingError(QDeltaNetError):
    """A plan or rule cannot be bound to the formats, scales or sizes asked for."""


class NonFiniteError(QDeltaNetError):
    """NaN or Inf reached a site. `site` is its name; the layer is added by whoever knows it."""

    def __init__(self, site: str, where: str = "") -> None:
        self.site = site
        super().__init__(f"{where}site {site}: NaN or Inf in the activations; check the model's weights and inputs")


def unknown(kind: str, name: object, known: Iterable[str]) -> QDeltaNetError:
    """One line for an unknown name, with the nearest valid ones (all of them where few)."""
    options = sorted(set(known))
    near = difflib.get_close_matches(str(name), options, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(options)}"
    return QDeltaNetError(f"unknown {kind} {name!r}; {hint}")
