"""Every figure, one look: `fedutils.plots.NAME`, wherever in this wing it is drawn."""

from importlib import import_module
from typing import Any

DRAWN_IN = ("films", "scores", "style", "training", "trust")


def __getattr__(name: str) -> Any:
    """Return the figure, or what else the rooms have, of this name."""
    for room in DRAWN_IN if not name.startswith("__") else ():
        if name in (there := vars(import_module(f".{room}", __name__))):
            return there[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
