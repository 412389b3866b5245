"""Run the four notebooks with papermill, skip those that are unchanged, and make their pairs.

A notebook is executed from its `.py` (jupytext), or from its `.ipynb` where there is no `.py` or no
jupytext, as on Kaggle. Executed copies, their HTML and `state.json` go to `work/notebooks/NAME/`.
"""

import ast
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from . import nih
from .federation import best_rounds, read_history
from .findings import InputError
from .images import write_atomic
from .partition import check_splits
from .settings import TYPES, Settings, convert, read_parameters

NOTEBOOKS = ("01_explore", "02_preprocess", "03_federated_train", "04_evaluate")
READ_FILMS = NOTEBOOKS[:2]
TRAINS = NOTEBOOKS[2]
PACKAGE = Path(__file__).resolve().parent
FOLDER = PACKAGE.parent / "notebooks"
# Below the work folder: what a notebook depends on beside code and parameters, and what it leaves.
TRAINED = ("runs/{}/*.json", "runs/{}/*.csv", "runs/{}/*.safetensors", "runs/{}/models/*")
PREPARED = ("prepared/report.json", "prepared/index.csv")
BOXES = "prepared/boxes.csv"
INPUTS = dict(zip(NOTEBOOKS, ((), (), PREPARED, (*PREPARED, BOXES, *TRAINED)), strict=True))
OUTPUTS = {
    "02_preprocess": (*PREPARED, BOXES, "prepared/images.npy"),
    "03_federated_train": TRAINED,
    "04_evaluate": ("runs/{}/evaluation/*", "runs/{}/MODEL_CARD.md"),
}
HASHED_BYTES = 100_000_000  # a larger file, such as all films at 224 pixels, is told by its size
OPTIONS = ("profile", "data_dir", "work_dir", "name")  # have an option of their own
# nbconvert's template without its scripts from the network, and with a rule for narrow screens.
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>
main { max-width: 60rem; margin: auto } img { max-width: 100%; height: auto }
@media (max-width: 40rem) { .jp-InputPrompt, .jp-OutputPrompt { display: none }
  .jp-RenderedHTMLCommon { overflow-x: auto } .jp-Notebook { padding: 0.5rem } }
</style>{%- endblock -%}"""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error: the message names notebook, cell and error."""


@dataclass(frozen=True)
class Job:
    """One notebook of a run, read and with its parameters."""

    stem: str
    node: NotebookNode
    settings: Settings
    cwd: Path
    data: str  # identity of the data folder

    @property
    def output(self) -> Path:
        """The executed notebook."""
        return Path(self.settings.work_dir, "notebooks", self.settings.name, f"{self.stem}.ipynb")

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the resolved parameters that this notebook declares."""
        values = asdict(self.settings)
        return {name: values[name] for name in declared(self.node) if name in values}

    def key(self) -> str:
        """Return a hash of all that the result depends on: code, parameters and inputs."""
        code = [cell.source for cell in self.node.cells if cell.cell_type == "code"]
        package = [path.read_text() for path in sorted(PACKAGE.glob("*.py"))]
        data = self.data if self.stem in READ_FILMS else ""
        inputs = self._digests(INPUTS[self.stem])
        return _hash(json.dumps([code, package, self.parameters, data, inputs]).encode())

    def left(self) -> dict[str, str]:
        """Return the hashes of what the notebook left, the executed copy and its HTML included."""
        copies = [self.output, self.output.with_suffix(".html")]
        here = {path.name: _digest(path) for path in copies if path.is_file()}
        return here | self._digests(OUTPUTS.get(self.stem, ()))

    def is_unchanged(self) -> bool:
        """Tell whether this notebook has finished, and nothing it depends on or left differs."""
        if self.stem == TRAINS and self.is_unfinished():
            return False
        return _read_state(self.output.parent).get(self.stem) == [self.key(), self.left()]

    def is_unfinished(self) -> bool:
        """Tell whether training stopped early, at `max_hours`: then it is always continued."""
        return not (self.settings.run / "finished.json").is_file()

    def record(self, key: str) -> None:
        """Note that this notebook has finished."""
        state = _read_state(self.output.parent) | {self.stem: [key, self.left()]}
        write_atomic(self.output.parent / "state.json", json.dumps(state, indent=1).encode())

    def _digests(self, patterns: Iterable[str]) -> dict[str, str]:
        """Hash the files below the work folder; a file that is not there is left out."""
        work = Path(self.settings.work_dir)
        found = [path for p in patterns for path in work.glob(p.format(self.settings.name))]
        files = sorted(path for path in found if path.is_file())
        return {str(path.relative_to(work)): _digest(path) for path in files}


def run(
    values: Mapping[str, Any], only: str = "", force: bool = False, notebooks: Path = FOLDER
) -> Settings:
    """Execute the notebooks in order with these parameters, and return the parameters as resolved.

    `only` is a list such as "03,04"; what is unchanged is skipped unless `force`.
    Raises InputError for what the user can mend, before any notebook starts where that can be
    known, and NotebookFailed for every other error in a notebook.
    """
    chosen = _choose(only)
    nodes = {stem: read_notebook(notebooks, stem) for stem in NOTEBOOKS}
    settings, data = resolve(values, nodes)
    jobs = [Job(stem, nodes[stem], settings, notebooks, identify(data)) for stem in chosen]
    _check_before(jobs, data, force)
    for job in jobs:
        if not force and job.is_unchanged():
            print(f"{job.stem:<19} skipped (unchanged)", flush=True)
        else:
            key = job.key()  # what it depends on as it starts, not as it ends
            execute(job.node, job.output, job.parameters, job.cwd)
            job.record(key)
    _print_results(jobs)
    return settings


def sweep(
    values: Mapping[str, Any],
    grid: Mapping[str, list[str]],
    only: str = "",
    force: bool = False,
    notebooks: Path = FOLDER,
) -> list[Settings]:
    """Execute a run for each combination of the grid's values, and return their parameters.

    A run that is finished is skipped, the films are prepared once, and equal models are shared.
    With a name given, a run is called NAME-VALUE-VALUE. The last run's notebook 04 lays all of them
    side by side, and a table on validation films, to choose by, is printed. A notebook that fails
    costs its run only: NotebookFailed is raised at the end. Raises InputError, before any notebook
    starts, where `run` would for any combination.
    """
    nodes = {stem: read_notebook(notebooks, stem) for stem in NOTEBOOKS}
    prepares = {*OPTIONS, *declared(nodes[READ_FILMS[1]])}
    if taken := [key for key in grid if key in prepares or key in values]:
        raise InputError(
            f"sweep {taken[0]}: prepares other films or is given already; sweep it by a run each,"
            " in a work folder each"
        )
    runs = []
    for row in itertools.product(*grid.values()):
        name = "-".join([values["name"], *row]) if values.get("name") else ""
        runs.append(dict(values) | dict(zip(grid, row, strict=True)) | {"name": name})
    resolved = [resolve(one, nodes)[0] for one in runs]
    runs[-1]["compare"] = ",".join(settings.name for settings in resolved[:-1])
    stems, failures = _choose(only), []
    for number, one in enumerate(runs, start=1):
        texts = " ".join(f"{key}={one[key]}" for key in grid)
        print(f"\nRun {number} of {len(runs)}: {texts}", flush=True)
        chosen = [stem[:2] for stem in stems if number == 1 or stem not in READ_FILMS]
        try:
            run(one, ",".join(chosen), force, notebooks)
        except NotebookFailed as error:
            failures.append(f"{texts}: {error}")
    _print_validation(runs, resolved, list(grid))
    if failures:
        raise NotebookFailed("; ".join(failures))
    return resolved


def read_notebook(folder: Path, stem: str) -> NotebookNode:
    """Read a notebook from its .py, else from its .ipynb."""
    source, pair = folder / f"{stem}.py", folder / f"{stem}.ipynb"
    try:
        import jupytext  # not on Kaggle
    except ImportError:
        jupytext = None
    if jupytext and source.is_file():
        return jupytext.read(source)
    if not pair.is_file():
        raise InputError(f"{pair} is missing; run from a checkout of the project")
    return nbformat.read(pair, as_version=4)


def declared(node: NotebookNode) -> list[str]:
    """Return the names that the parameters cell assigns."""
    cells = [cell.source for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [part for part in ast.walk(ast.parse("\n".join(cells))) if isinstance(part, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def identify(folder: Path | None) -> str:
    """Return a hash of a data folder: the content of its tables, the names of its films."""
    if folder is None:
        return "phantom"
    tables = [
        path for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".txt", ".gz", ".toml")
    ]
    names = sorted((here, sorted(files)) for here, _, files in os.walk(folder, followlinks=True))
    return _hash(json.dumps([[_digest(path) for path in tables], names]).encode())


class Indented(io.TextIOBase):
    """A text stream that shows a notebook's printed lines, indented, as they come."""

    def write(self, text: str) -> int:
        """Print text, which may begin and end within a line."""
        print(text.replace("\n", "\n    "), end="", flush=True)
        return len(text)


def execute(node: NotebookNode, output: Path, parameters: Mapping[str, Any], cwd: Path) -> None:
    """Execute one notebook into `output` and write its HTML beside it, whether it fails or not."""
    _prepare(output.parent)
    trains = output.stem == TRAINS  # prints a line a round, which a batch log should show at once
    print(f"{output.stem:<19}", end=" running\n    " if trains else " ", flush=True)
    started, failure = time.monotonic(), None
    try:
        papermill.execute_notebook(
            node,
            str(output).replace("{", "{{").replace("}", "}}"),  # papermill fills in braces
            dict(parameters),
            cwd=str(cwd),
            kernel_name="python3",
            progress_bar=False,
            coalesce_streams=True,  # one output a cell, not one for each time it is flushed
            extra_arguments=["--log-level=CRITICAL"],  # of the kernel about itself
            stdout_file=Indented() if trains else None,
        )
    except (PapermillExecutionError, RuntimeError) as error:  # a dead kernel is a RuntimeError
        failure = error
    result, page = "failed" if failure else "done", write_html(output)
    print(f"{result} in {time.monotonic() - started:.0f} s  -> {os.path.relpath(page)}", flush=True)
    if failure:
        raise _explain(output, failure) from failure


def write_html(path: Path) -> Path:
    """Write an executed notebook as one HTML file, which asks nothing of the network."""
    loader = DictLoader({"report.html.j2": TEMPLATE})
    exporter = HTMLExporter(extra_loaders=[loader], template_file="report.html.j2")
    html, _ = exporter.from_filename(str(path))
    write_atomic(path.with_suffix(".html"), html.encode())
    return path.with_suffix(".html")


def render(notebooks: Path = FOLDER) -> None:
    """Execute all notebooks as the demo; write the results as the committed pairs, with a picture.

    They run unchanged, with no parameters injected, in a copy of the folder: default parameters on
    the phantom, without GPU, in a fresh work folder.
    """
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "NIH_DATA_DIR": ""}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve()
        shutil.copytree(notebooks, root / "notebooks")
        done = [root / "executed" / f"{stem}.ipynb" for stem in NOTEBOOKS]
        for path in done:
            execute(read_notebook(notebooks, path.stem), path, {}, root / "notebooks")
        files = {p.name: _clean(nbformat.read(p, as_version=4), root).encode() for p in done}
        for picture in root.glob("work/runs/*/evaluation/auroc.png"):
            files["result.png"] = picture.read_bytes()
    for name, content in files.items():
        write_atomic(notebooks / name, content)
    print(f"Pairs: {', '.join(files)} in {os.path.relpath(notebooks)}/")


def _clean(node: NotebookNode, root: Path) -> str:
    """Return an executed notebook as text, without times, private paths and random ids."""
    kept = {"kernelspec": node.metadata.kernelspec, "language_info": {"name": "python"}}
    node.metadata = nbformat.from_dict(kept)
    sources = [cell.source for cell in node.cells]
    for i, cell in enumerate(node.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.id = _hash(f"{sources[:i].count(cell.source)} {cell.source}".encode())[:8]
    text = nbformat.writes(node).replace(f"{root}/", "") + "\n"
    for private in (str(root), str(PACKAGE.parent), sys.prefix):
        if private in text:
            raise NotebookFailed(f"a cell holds {private}: print paths relative to the root")
    return text


def _choose(only: str) -> list[str]:
    """Turn "03,04" into the names of notebooks; all if empty."""
    numbers = {stem[:2]: stem for stem in NOTEBOOKS}
    wanted = [number.strip() for number in only.split(",")] if only else list(numbers)
    if unknown := [number for number in wanted if number not in numbers]:
        raise InputError(f"--only {only}: no notebook {unknown[0]!r}; known: {', '.join(numbers)}")
    return [stem for number, stem in numbers.items() if number in wanted]


def resolve(
    values: Mapping[str, Any], nodes: Mapping[str, NotebookNode]
) -> tuple[Settings, Path | None]:
    """Check names and values, find the data, and return the resolved parameters and its folder."""
    known = {*OPTIONS, *(name for node in nodes.values() for name in declared(node))}
    for name in values:
        if name not in TYPES or name not in known:
            allowed = ", ".join(name for name in TYPES if name in known)
            raise InputError(f"unknown parameter {name!r}; allowed are {allowed}")
    typed = {name: convert(name, value) for name, value in values.items()}
    data = nih.find_data(typed.get("data_dir", ""))
    return read_parameters(typed | {"data_dir": str(data or "")}), data


def _check_before(jobs: list[Job], data: Path | None, force: bool) -> None:
    """Raise InputError for a table or a work folder that would stop a notebook later."""
    # A finished notebook has read the same table already, which takes seconds for all films.
    if data and any(job.stem in READ_FILMS and (force or not job.is_unchanged()) for job in jobs):
        table = nih.read_nih(data).table
        if {job.stem for job in jobs} != {NOTEBOOKS[0]}:
            check_splits(table, jobs[0].settings.seed)
    _prepare(jobs[0].output.parent)


def _prepare(folder: Path) -> None:
    """Make the output folder, let kernels import this package, and silence the Jupyter tools."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"work_dir: {folder} cannot be made ({error.strerror})") from error
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _explain(output: Path, error: Exception) -> Exception:
    """Turn an execution error into one that names notebook, cell and error."""
    if isinstance(error, PapermillExecutionError):
        if error.ename == "InputError":
            return InputError(error.evalue)
        number, source, what = error.exec_count, error.source, f"{error.ename}: {error.evalue}"
    else:  # papermill does not say where a kernel died: it is the last cell that was begun
        cells = [c for c in nbformat.read(output, as_version=4).cells if c.cell_type == "code"]
        begun = [c.source for c in cells if c.metadata.papermill.get("start_time")]
        number, source = len(begun), (begun or [""])[-1]
        what = f"{type(error).__name__}: {error}"
    line = source.partition("\n")[0]
    return NotebookFailed(f"{output.stem} failed in cell [{number}] {line!r}: {what}")


def _print_results(jobs: list[Job]) -> None:
    """Say where everything lies; after notebook 04 also the headline figures."""
    print(f"\nExecuted notebooks and HTML: {os.path.relpath(jobs[0].output.parent)}/")
    if any(job.stem == TRAINS and job.is_unfinished() for job in jobs):
        print("Training stopped at max_hours; the same command goes on from there.")
    path = jobs[0].settings.run / "evaluation" / "summary.json"
    if jobs[-1].stem == NOTEBOOKS[-1] and path.is_file():
        print(f"Summary: {os.path.relpath(path)}\n")
        print("\n".join(json.loads(path.read_text()).get("headline", [])))


def _print_validation(
    runs: list[dict[str, Any]], resolved: list[Settings], keys: list[str]
) -> None:
    """Print what each run of a sweep reached on validation films, by arm, as a Markdown table."""
    print(f"\n| {' | '.join(keys)} | run | arm | models | AUROC | loss | best round |")
    print("|---" * (len(keys) + 6) + "|")
    for one, settings in zip(runs, resolved, strict=True):
        if not (settings.run / "history.csv").is_file():
            continue  # notebook 03 was not among the chosen ones
        for arm, rows in best_rounds(read_history(settings.run)).groupby("arm", sort=False):
            cells = [str(one[key]) for key in keys] + [settings.name, arm, str(len(rows))]
            mean = rows[["val_auroc", "val_loss", "round"]].mean()
            cells += [f"{mean['val_auroc']:.3f}", f"{mean['val_loss']:.3f}", f"{mean['round']:.1f}"]
            print(f"| {' | '.join(cells)} |")


def _read_state(folder: Path) -> dict[str, Any]:
    """Return what is known of finished notebooks; nothing if the file is missing or damaged."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def _digest(path: Path) -> str:
    """Return a hash of a file: of report.json its fingerprint, of a very large one its size."""
    if path.name == "report.json":
        with suppress(ValueError, KeyError):  # damaged: notebook 02 is to write it again
            return json.loads(path.read_text())["fingerprint"]
    size = path.stat().st_size
    return str(size) if size > HASHED_BYTES else _hash(path.read_bytes())


def _hash(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()
