"""The search for the cheapest recipe whose loss stays within a budget, layer by layer."""

from .adapt import Adapted, adapt_neumann
from .candidates import FORMATS, SEARCHED
from .harness import Harness, Loss
from .journal import Journal
from .run import Found, Point, search
from .session import search_to
from .stages import Settings

__all__ = [
    "FORMATS",
    "SEARCHED",
    "Adapted",
    "Found",
    "Harness",
    "Journal",
    "Loss",
    "Point",
    "Settings",
    "adapt_neumann",
    "search",
    "search_to",
]
