"""The ledger of a work folder: what was released of each patient, and what it costs in all."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from ..base.errors import InputError
from ..base.files import sha256, write_private
from .accountant import compose


class Release(NamedTuple):
    """Some steps of one model on the patients of one hospital, who are `patients` of a ledger."""

    noise: float
    rate: float
    patients: str
    steps: int


class Ledger:
    """What left a work folder, in `privacy/`: all arms, seeds, sweeps and searches in it, those
    without privacy too.

    A release is one model at one hospital; the same model, trained again from the same seed or
    adopted by another run, has the same bits and is the same release. It is written before an
    update leaves. It knows nothing of what was released elsewhere about the same patients.
    """

    def __init__(self, work: Path) -> None:
        self.folder, self.file = work / "privacy", work / "privacy" / "ledger.json"
        self.lock = FileLock(self.folder / "ledger.lock")

    def register(self, patients: Sequence[str]) -> str:
        """Write down who the patients of a hospital are; return the hash that names them."""
        names = json.dumps(sorted(patients)).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock:
            if not (path := self._names(sha256(names))).is_file():
                write_private(path, names)
        return sha256(names)

    def read(self) -> dict[str, Release]:
        """Return the releases by their key; InputError if damaged: then nothing is released."""
        text = self.file.read_text() if self.file.is_file() else "{}"
        try:
            return {key: Release(**entry) for key, entry in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.file} cannot be read ({error}): nothing is released"
            ) from error

    def write(self, releases: Mapping[str, Release]) -> None:
        """Write down what has been released in all of some models at a hospital, by their key."""
        with self.lock:
            entries = {k: entry._asdict() for k, entry in (self.read() | dict(releases)).items()}
            write_private(self.file, json.dumps(entries, indent=1))

    def total(
        self, patients: Iterable[str], delta: float, planned: Mapping[str, Release] | None = None
    ) -> float:
        """Return the epsilon at `delta` of all releases, for that patient who is in most of them.

        `planned` ones replace or join what is written. Rényi divergences add up over the releases
        that hold a patient (Mironov, CSF 2017, proposition 1).
        """
        releases = (self.read() | dict(planned or {})).values()
        holders = {r.patients: self._holders(r.patients) for r in releases}
        kinds = {frozenset(h for h, names in holders.items() if p in names) for p in patients}
        sums = [[(r.noise, r.rate, r.steps) for r in releases if r.patients in k] for k in kinds]
        return max((compose(parts, delta) for parts in sums), default=0.0)

    def _holders(self, patients: str) -> set[str]:
        """Return the patients whom a hash names; InputError where that is not what lies there."""
        path = self._names(patients)
        text = path.read_bytes() if path.is_file() else b""
        if sha256(text) != patients:
            raise InputError(f"{path} is missing or damaged: nothing is released")
        return set(json.loads(text))

    def _names(self, patients: str) -> Path:
        return self.folder / f"patients-{patients[:16]}.json"


def note_open(work: Path, model: str, name: str, patients: Iterable[str]) -> None:
    """Write down that a client trains without privacy: of its patients, epsilon is infinite."""
    ledger = Ledger(work)
    known = ledger.register(sorted(set(patients)))
    ledger.write({f"{model} {name}": Release(0.0, 1.0, known, 1)})
