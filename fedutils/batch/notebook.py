"""One notebook: read, executed with papermill, written as HTML, rendered."""

import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from ..base.errors import InputError, NotebookFailed
from ..base.files import PACKAGE, sha256, write_atomic
from ..base.parameters import assigned

NOTEBOOKS = ("01_explore", "02_preprocess", "03_federated_train", "04_evaluate")
READ_FILMS = NOTEBOOKS[:2]
TRAINS, EVALUATE = NOTEBOOKS[2:]
FOLDER = PACKAGE.parent / "notebooks"
NOT_INHERITED = ("MATPLOTLIBRC", "PYTHONSTARTUP", "PYTHONWARNINGS")  # by kernels
TEMPLATE = (Path(__file__).parent / "report.html.j2").read_text()


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


def parameter_cells(node: NotebookNode) -> list[NotebookNode]:
    """Return the cells that hold parameters: one, as papermill wants it."""
    return [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]


def declared(node: NotebookNode) -> list[str]:
    """Return the names that the parameters cell assigns."""
    return assigned(*(cell.source for cell in parameter_cells(node)))


class Indented(io.TextIOBase):
    """A text stream that shows a notebook's printed lines, indented, as they come."""

    def write(self, text: str) -> int:
        """Print text, which may begin and end within a line."""
        print(text.replace("\n", "\n    "), end="", flush=True)
        return len(text)


def execute(node: NotebookNode, output: Path, parameters: Mapping[str, Any], cwd: Path) -> None:
    """Execute one notebook into `output`, and write one file of HTML beside it even if it fails."""
    prepare(output.parent)
    trains = output.stem == TRAINS  # prints a line a round, which a batch log should show at once
    print(f"{output.stem:<19}", end=" running\n    " if trains else " ", flush=True)
    started, failure = time.monotonic(), None
    try:
        with kernel_environment():
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
    loader, page = DictLoader({"report.html.j2": TEMPLATE}), output.with_suffix(".html")
    exporter = HTMLExporter(extra_loaders=[loader], template_file="report.html.j2")
    write_atomic(page, exporter.from_filename(str(output))[0].encode())
    result = "failed" if failure else "done"
    print(f"{result} in {time.monotonic() - started:.0f} s  -> {os.path.relpath(page)}", flush=True)
    if failure:
        raise _explain(output, failure) from failure


def render(notebooks: Path = FOLDER) -> None:
    """Execute all notebooks as the demo, in a copy; write the committed pairs, with a picture."""
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
    kernel = node.metadata.kernelspec
    node.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    sources = [cell.source for cell in node.cells]
    for i, cell in enumerate(node.cells):
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        cell.id = sha256(f"{sources[:i].count(cell.source)} {cell.source}".encode())[:8]
    text = nbformat.writes(node).replace(f"{root}/", "") + "\n"
    for private in (str(root), str(PACKAGE.parent), sys.prefix):
        if private in text:
            raise NotebookFailed(f"a cell holds {private}: print paths relative to the root")
    return text


def prepare(folder: Path) -> None:
    """Make the output folder, and silence the Jupyter tools."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"work_dir: {folder} cannot be made ({error.strerror})") from error
    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def kernel_environment() -> Iterator[None]:
    """Let kernels that start meanwhile import this package, show figures, and be like any other.

    What the user's shell asks of Python, Jupyter and Matplotlib is for the user's own sessions.
    """
    before = dict(os.environ)
    paths = [str(PACKAGE.parent), before.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as place:
        for name in before:
            if name.startswith(("IPYTHON", "JUPYTER_")) or name in NOT_INHERITED:
                del os.environ[name]
        os.environ |= {
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "IPYTHONDIR": place,
            "JUPYTER_RUNTIME_DIR": place,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
        }
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


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
