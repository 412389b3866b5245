"""The committed .ipynb are the .py, executed in order as the demo."""

import jupytext
import nbformat
import pytest

from fedutils.base.errors import NotebookFailed
from fedutils.batch import notebook
from fedutils.batch.notebook import FOLDER, NOTEBOOKS, read_notebook, render

TINY = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tiny

# %% tags=["parameters"]
seed: int = 0  # fixes every draw

# %%
from pathlib import Path
print(Path.cwd() / "work", seed)

# %%
seed + 1
"""


def check_pairs(folder):
    """Return what is wrong with the .ipynb of a folder, one line for each problem."""
    return [problem for path in sorted(folder.glob("*.py")) for problem in check_pair(path)]


def check_pair(source):
    path = source.with_suffix(".ipynb")
    if not path.is_file():
        return [f"{path.name} is missing; run make render"]
    pair = nbformat.read(path, as_version=4)
    cells = [cell for cell in pair.cells if cell.cell_type == "code" and cell.source]
    outputs = [output.output_type for cell in cells for output in cell.outputs]
    counts = [cell.execution_count for cell in cells]
    right = {
        "differs from its .py": contents(pair) == contents(jupytext.read(source)),
        "was not executed in order": counts == list(range(1, len(cells) + 1)),
        "has no outputs": bool(outputs),
        "holds an error": "error" not in outputs,
    }
    return [f"{path.name} {problem}; run make render" for problem, so in right.items() if not so]


def contents(node):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in node.cells]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "NOTEBOOKS", NOTEBOOKS[:1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("NIH_DATA_DIR", "elsewhere")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01_explore.py").write_text(TINY)
    return tmp_path / "notebooks"


def test_the_committed_notebooks_are_their_py_executed_in_order():
    assert [path.stem for path in sorted(FOLDER.glob("*.py"))] == list(NOTEBOOKS)
    assert check_pairs(FOLDER) == []


def test_render_writes_a_pair_that_repeats_to_the_byte_and_holds_no_private_path(folder):
    render(folder)
    first = (folder / "01_explore.ipynb").read_text()
    node = nbformat.reads(first, as_version=4)
    nbformat.validate(node)
    assert check_pairs(folder) == []
    assert [cell.metadata for cell in node.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert node.cells[2].outputs[0].text == "notebooks/work 0\n"
    assert sorted(path.name for path in folder.iterdir()) == ["01_explore.ipynb", "01_explore.py"]
    render(folder)
    assert (folder / "01_explore.ipynb").read_text() == first


def test_a_private_path_in_an_output_is_refused(folder):
    (folder / "01_explore.py").write_text(TINY + "\n# %%\nimport sys\nsys.prefix\n")
    with pytest.raises(NotebookFailed, match="a cell holds"):
        render(folder)
    assert not (folder / "01_explore.ipynb").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda node: node.cells[3].update(source="seed + 2"), "differs from its .py"),
        (lambda node: node.cells[1].metadata.clear(), "differs from its .py"),
        (lambda node: node.cells[3].update(execution_count=1), "was not executed in order"),
        (lambda node: [cell.update(outputs=[]) for cell in node.cells[1:]], "has no outputs"),
        (
            lambda node: node.cells[3].outputs.append(
                nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
            ),
            "holds an error",
        ),
    ],
)
def test_a_pair_that_is_not_the_executed_py_is_named(folder, change, problem):
    node = read_notebook(folder, "01_explore")
    for number, cell in enumerate(node.cells[1:], start=1):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text="a result")]
    nbformat.write(node, folder / "01_explore.ipynb")
    assert check_pairs(folder) == []
    change(node)
    nbformat.write(node, folder / "01_explore.ipynb")
    assert check_pairs(folder) == [f"01_explore.ipynb {problem}; run make render"]


def test_a_missing_pair_is_named(folder):
    assert check_pairs(folder) == ["01_explore.ipynb is missing; run make render"]
