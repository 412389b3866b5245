"""What a hospital has released of each model, also in a round that is asked for again."""

import json
from pathlib import Path

from ..base.files import write_atomic
from ..base.state import State


def read_ledger(path: Path) -> dict[str, dict[str, int]]:
    """Return what was spent on each model so far; ValueError if damaged: release nothing then."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_ledger(path: Path, model: str, spent: State) -> None:
    """Write down what has been spent on a model in all, this release included."""
    entry = {name: int(count) for name, count in spent.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(read_ledger(path) | {model: entry}, indent=1).encode())
