"""The four notebooks in order; what is unchanged is skipped."""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from ..base.errors import InputError
from ..base.files import disk_full_named, package_files, sha256, write_atomic
from ..base.provenance import provenance
from ..films.decode import FilmParameters
from ..films.find import list_tables, walk
from ..films.prepared import PREPARED_WITH
from ..films.sources import split_folders
from ..films.split import SplitParameters
from ..settings import FIELDS, Settings, convert_texts, read_parameters
from . import notebook
from .early import check_early
from .notebook import EVALUATE, NOTEBOOKS, READ_FILMS, TRAINS, execute
from .trained import EVALUATES, check_trained, read_run

FILES = tomllib.loads(Path(__file__).with_name("notebooks.toml").read_text())
HASHED_BYTES = 100_000_000  # a larger file, such as all films at 224 pixels, is told by its size
# What a notebook reads, whether or not its cell shows it.
EXPLORES = ("data_dir", "work_dir", "profile", "seed", "findings")
FILMS = *fields(SplitParameters), *fields(FilmParameters)
PREPARES = (*EXPLORES[:3], *(field.name for field in FILMS))
TRAINS_WITH = tuple(FIELDS.keys() - {"compare"})
READS = dict(zip(NOTEBOOKS, (EXPLORES, PREPARES, TRAINS_WITH, EVALUATES), strict=True))


@dataclass(frozen=True)
class Step:
    """One notebook of a run, read and with its parameters."""

    stem: str
    node: NotebookNode
    settings: Settings
    data: str  # identity of the data folder
    given: tuple[str, ...]  # the parameters that the user gave

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return Path(self.settings.work_dir, "notebooks", self.settings.name, f"{self.stem}.ipynb")

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the resolved parameters that its cell shows, or that were given and it reads."""
        shown = [name for name in notebook.declared(self.node) if name in FIELDS]
        read = [name for name in self.given if name in READS[self.stem]]
        names = dict.fromkeys([*shown, *read])
        return {name: getattr(self.settings, name) for name in names}

    def key(self) -> str:
        """Return a hash of all that the result depends on: code, parameters and inputs.

        For training that is also what `provenance` tells of; where other runs are compared, these.
        """
        code = [cell.source for cell in self.node.cells if cell.cell_type == "code"]
        package = [path.read_text() for path in package_files()]
        data = self.data if self.stem in READ_FILMS else ""
        inputs = self._digests("wants")
        beside, asked = {}, self.settings
        if self.stem == TRAINS:
            beside = provenance(asked.device, asked.precision, asked.weights)
        elif self.stem == EVALUATE:
            beside = {name: self._digests("compares", name) for name in asked.compared}
        return sha256(json.dumps([code, package, self.parameters, data, inputs, beside]).encode())

    def left(self) -> dict[str, str]:
        """Return the hashes of what the notebook left, the executed copy and its HTML included."""
        return self._digests("leaves")

    def is_unchanged(self) -> bool:
        """Tell whether this notebook has finished, and nothing it depends on or left differs."""
        state = _read_state(self.output.parent)
        return not self.is_stopped() and state.get(self.stem) == [self.key(), self.left()]

    def why(self) -> str:
        """Say why this notebook is to run; empty if it is unchanged."""
        if self.is_unchanged():
            return ""
        if self.is_stopped() and (self.settings.run / "config.json").is_file():
            return "its training is unfinished, and goes on"
        if not (state := _read_state(self.output.parent).get(self.stem)):
            return "it has not run"
        same = state[0] == self.key()
        return "what it left has changed" if same else "its code, parameters or inputs are others"

    def is_stopped(self) -> bool:
        """Tell whether training stopped early, at `max_hours`: then it is always continued."""
        return self.stem == TRAINS and not (self.settings.run / "finished.json").is_file()

    def _digests(self, kind: str, run: str = "") -> dict[str, str]:
        """Hash the files of a run that notebooks.toml lists; one that is not there is left out."""
        work, run = Path(self.settings.work_dir), run or self.settings.name
        found = [f for p in FILES[self.stem].get(kind, ()) for f in work.glob(p.format(run))]
        files = sorted(path for path in found if path.is_file())
        return {str(path.relative_to(work)): _digest(path) for path in files}


def plan_steps(values: Mapping[str, Any], only: str = "") -> list[Step]:
    """Return the notebooks that these parameters, and `only`, are to execute, in order.

    Raises InputError for a parameter that none of them heeds, or that is not that of the run.
    """
    chosen = choose_notebooks(only)
    nodes = {stem: notebook.read_notebook(notebook.FOLDER, stem) for stem in NOTEBOOKS}
    settings = read_parameters(convert_texts(values))
    films = identify(split_folders(settings.data_dir), Path(settings.work_dir))
    jobs = [Step(stem, nodes[stem], settings, films, given=tuple(values)) for stem in chosen]
    if EVALUATE in chosen and TRAINS not in chosen:
        check_trained(values, read_run(settings.work_dir, settings.name))
    elif TRAINS not in chosen:
        heeded = {"name", *(name for stem in chosen for name in READS[stem])}
        named = bool(values.get("name"))  # else a run's identity is its name
        free = [n for n in values if named or not FIELDS[n].metadata["identity"]]
        for name in [name for name in free if name not in heeded]:
            raise InputError(f"{name}: notebook {only} does not heed it; leave it out here")
    return jobs


def run(values: Mapping[str, Any], only: str = "", force: bool = False) -> Settings:
    """Execute the notebooks in order with these parameters, and return the parameters as resolved.

    `only` is a list such as "03,04"; what is unchanged is skipped unless `force`. Raises InputError
    for what the user can mend, before any notebook starts if possible, else NotebookFailed.
    """
    jobs = plan_steps(values, only)
    settings = jobs[0].settings
    # A finished notebook has read the same table already, which takes seconds for all films.
    check_early([settings], [job.stem for job in jobs if force or not job.is_unchanged()])
    notebook.prepare(jobs[0].output.parent)
    for job in jobs:
        if not force and job.is_unchanged():
            print(f"{job.stem:<19} skipped (unchanged)", flush=True)
        else:
            key = job.key()  # what it depends on as it starts, not as it ends
            with disk_full_named(job.output):
                execute(job.node, job.output, job.parameters, notebook.FOLDER)
            state = _read_state(job.output.parent) | {job.stem: [key, job.left()]}
            write_atomic(job.output.parent / "state.json", json.dumps(state, indent=1).encode())
    _print_results(jobs)
    return settings


def identify(folders: Iterable[Path], work: Path) -> str:
    """Return a hash of data folders: their tables, and names, sizes and times of their films.

    What we wrote below `work` ourselves is no input, should it lie in that folder.
    """
    content = []
    for folder in folders:
        tables, found = list_tables(folder), []
        for here, _, files in walk(folder, work):
            films = [path for name in files if (path := here / name) not in tables]
            found += [(str(path), _stamp(path)) for path in films]
        content.append([[_digest(path) for path in tables], sorted(found)])
    return sha256(json.dumps(content).encode()) if content else "phantom"


def _stamp(path: Path) -> list[int]:
    """Return the size and time of a file; nothing for a link that leads nowhere."""
    with suppress(OSError):
        about = path.stat()
        return [about.st_size, about.st_mtime_ns]
    return []


def choose_notebooks(only: str) -> list[str]:
    """Turn "03,04" into the names of notebooks; all if empty."""
    numbers = {stem[:2]: stem for stem in NOTEBOOKS}
    wanted = [number.strip() for number in only.split(",")] if only else list(numbers)
    if unknown := [number for number in wanted if number not in numbers]:
        raise InputError(f"--only {only}: no notebook {unknown[0]!r}; known: {', '.join(numbers)}")
    return [stem for number, stem in numbers.items() if number in wanted]


def _print_results(jobs: list[Step]) -> None:
    """Say where everything lies; after notebook 04 also the headline figures."""
    print(f"\nExecuted notebooks and HTML: {os.path.relpath(jobs[0].output.parent)}/")
    if any(job.is_stopped() for job in jobs):
        print("Training stopped at max_hours; the same command goes on from there.")
    path = jobs[0].settings.run / "evaluation" / "summary.json"
    if jobs[-1].stem == EVALUATE and path.is_file():
        print(f"Summary: {os.path.relpath(path)}\n")
        print("\n".join(json.loads(path.read_text()).get("headline", [])))


def _read_state(folder: Path) -> dict[str, Any]:
    """Return what is known of finished notebooks; nothing if the file is missing or damaged."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def _digest(path: Path) -> str:
    """Return a hash of a file: of report.json what was prepared; of a very large one its size."""
    if path.name == "report.json":
        with suppress(ValueError, AttributeError):  # damaged: notebook 02 is to write it again
            report = json.loads(path.read_text())
            return sha256(repr([report.get(k) for k in ("fingerprint", *PREPARED_WITH)]).encode())
    size = path.stat().st_size
    return str(size) if size > HASHED_BYTES else sha256(path.read_bytes())
