"""What a hospital has released of each model, written down before it leaves."""

import json
from pathlib import Path

import torch

from ..base.files import write_atomic
from ..base.state import State


class Ledger:
    """A file of a hospital's that adds up what was spent, whatever becomes of the rounds.

    A server that was killed asks for the same round again: both releases count.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, model: str) -> State:
        """Return what was spent on a model so far, by name; empty before the first release."""
        return {name: torch.tensor(count) for name, count in self._all().get(model, {}).items()}

    def write(self, model: str, spent: State) -> None:
        """Write down what has been spent on a model in all, this release included."""
        entry = {name: int(count) for name, count in spent.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self._all() | {model: entry}, indent=1)
        write_atomic(self.path, content.encode())

    def _all(self) -> dict[str, dict[str, int]]:
        """Read the file; a damaged one raises ValueError, since nothing may be released then."""
        return json.loads(self.path.read_text()) if self.path.is_file() else {}
