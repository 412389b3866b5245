"""The four kernels of the kit on a Kaggle of the test's own: read-only input, one session each."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import torch
from torchvision.models import resnet34

from fedutils.batch.kaggle import write_kit
from fedutils.batch.notebook import NOTEBOOKS
from fedutils.films.phantom.write import write_phantom

NIH = "datasets/organizations/nih-chest-xrays/data"
VALUES = {
    "image_size": 32,
    "num_clients": 2,
    "batch_size": 16,
    "tracked": "fc",
    "max_films": 80,
    "device": "cpu",
    "threads": 1,
}


class Kaggle:
    """Attaches what a kernel's metadata name, runs it without jupytext, and keeps its output."""

    def __init__(self, root):
        self.root, self.kit, self.outputs = root / "kaggle", root / "kit", root / "outputs"
        write_phantom(self.root / "input" / NIH, patients=60, size=64)
        (root / "blocked").mkdir()
        (root / "blocked/sitecustomize.py").write_text("import sys; sys.modules['jupytext'] = None")
        self.environment = os.environ | {
            "FEDUTILS_KAGGLE": str(self.root),
            "PYTHONPATH": str(root / "blocked"),
            "TORCH_HOME": str(root / "empty"),
            "PYTHONDONTWRITEBYTECODE": "1",  # as on Kaggle, where input is read only
        }
        self.environment.pop("NIH_DATA_DIR", None)

    def write_kit(self, **values):
        """Write the kit, and mount its two data sets as Kaggle does."""
        write_kit("somebody", self.kit, VALUES | values)
        weights = self.kit / "resnet-34-imagenet-weights/resnet34-b627a593.pth"
        if not weights.exists():
            torch.save(resnet34().state_dict(), weights)
        mounted = self.root / "input/datasets/somebody"
        shutil.rmtree(mounted, ignore_errors=True)
        for name in ("fedutils", "resnet-34-imagenet-weights"):
            shutil.copytree(self.kit / name, mounted / name, copy_function=os.link)

    def push(self, stem, *more):
        """Run one kernel in a fresh session with its sources, and return its text output."""
        about = json.loads((self.kit / stem / "kernel-metadata.json").read_text())
        notebooks, working = self.root / "input/notebooks", self.root / "working"
        shutil.rmtree(notebooks, ignore_errors=True)
        for source in [*about["kernel_sources"], *more]:
            output = self.outputs / source
            shutil.copytree(output, notebooks / source, copy_function=os.link)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        before = self.listing()
        notebook = [str(self.kit / stem / about["code_file"]), str(working / about["code_file"])]
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3"]
        done = subprocess.run(
            [*command, *notebook],
            cwd=working,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert self.listing() == before, "a kernel wrote into its input"
        shutil.rmtree(self.outputs / about["id"], ignore_errors=True)
        (self.outputs / about["id"]).parent.mkdir(parents=True, exist_ok=True)
        working.rename(self.outputs / about["id"])
        return text(self.outputs / about["id"] / about["code_file"])

    def listing(self):
        files = (self.root / "input").rglob("*")
        return {p: p.stat().st_mtime_ns for p in files if "__pycache__" not in p.parts}

    def output(self, stem):
        """Return the work folder that a kernel left."""
        about = json.loads((self.kit / stem / "kernel-metadata.json").read_text())
        return self.outputs / about["id"] / "work"


def text(path):
    node = nbformat.read(path, as_version=4)
    outputs = [output for cell in node.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    return "\n".join([output.get("text", "") for output in outputs] + data)


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """All four kernels; 03 in two sessions, the second with the output of the first attached."""
    it = Kaggle(tmp_path_factory.mktemp("session"))
    it.write_kit(rounds=1)
    it.texts = {stem: it.push(stem) for stem in NOTEBOOKS[:3]}
    (run,) = it.output(NOTEBOOKS[2]).glob("runs/*")
    it.first = pd.read_csv(run / "history.csv")
    it.write_kit(rounds=2)
    it.texts[NOTEBOOKS[2]] = it.push(NOTEBOOKS[2], "somebody/fedutils-03-federated-train")
    it.texts[NOTEBOOKS[3]] = it.push(NOTEBOOKS[3])
    return it


def test_each_kernel_uses_the_attached_package_and_says_so(kaggle):
    attached = kaggle.root / "input/datasets/somebody/fedutils/fedutils"
    for stem in NOTEBOOKS:
        assert kaggle.texts[stem].startswith("fedutils ")
        assert f"(attached, {attached})" in kaggle.texts[stem].splitlines()[0]


def test_the_environment_of_the_kernels_has_no_jupytext(kaggle):
    command = [sys.executable, "-c", "import jupytext"]
    assert subprocess.run(command, env=kaggle.environment, capture_output=True).returncode == 1


def test_each_kernel_writes_only_what_is_its_own(kaggle):
    wrote = {stem: {path.name for path in kaggle.output(stem).iterdir()} for stem in NOTEBOOKS}
    assert wrote == dict(
        zip(NOTEBOOKS, [{"explore"}, {"prepared"}, *[{"runs", "privacy"}] * 2], strict=True)
    )
    (run,) = kaggle.output(NOTEBOOKS[3]).glob("runs/*")
    assert {"metrics.csv", "summary.json"} <= {path.name for path in (run / "evaluation").iterdir()}


def test_max_films_makes_a_short_first_run_of_whole_patients(kaggle):
    report = json.loads((kaggle.output(NOTEBOOKS[1]) / "prepared/report.json").read_text())
    assert 40 < report["films"] <= 80 and report["patients"] > 10
    assert f"{report['films']} films of {report['patients']} patients" in kaggle.texts[NOTEBOOKS[1]]


def test_training_started_from_the_attached_weights(kaggle):
    (run,) = kaggle.output(NOTEBOOKS[2]).glob("runs/*")
    assert json.loads((run / "config.json").read_text())["weights"] == "imagenet"


def test_a_second_session_of_03_goes_on_where_the_attached_first_one_stopped(kaggle):
    (run,) = kaggle.output(NOTEBOOKS[2]).glob("runs/*")
    history = pd.read_csv(run / "history.csv")
    assert sorted(set(history["round"])) == [1, 2]
    pd.testing.assert_frame_equal(history[history["round"] == 1], kaggle.first)
    assert "round 1:" not in kaggle.texts[NOTEBOOKS[2]] and "round 2:" in kaggle.texts[NOTEBOOKS[2]]
