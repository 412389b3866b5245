"""The Kaggle kit, and what is found and carried over where kernels hand on their output."""

import json
import os
import re
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from tiny import tiny_films, tiny_settings

from fedutils.__main__ import main
from fedutils.base import device
from fedutils.base.device import find_copy
from fedutils.base.errors import InputError
from fedutils.base.files import PACKAGE, fetch_runs, package_files
from fedutils.base.weights import find_profile
from fedutils.batch.kaggle import slug, write_kit
from fedutils.batch.notebook import FOLDER, NOTEBOOKS, read_notebook
from fedutils.batch.trained import read_run
from fedutils.settings import read_parameters
from fedutils.training import training
from fedutils.training.training import Training

VALUES = {"max_films": "500"}
KNOW_KAGGLE = (
    "base.device",
    "base.files",
    "base.weights",
    "films.find",
    "run",
    "batch.trained",
    "training.features",
)


def move_kaggle(monkeypatch, tree):
    """Let every room that knows Kaggle's folder by name take another one for it."""
    for room in KNOW_KAGGLE:
        monkeypatch.setattr(f"fedutils.{room}.KAGGLE", tree)
    monkeypatch.setattr("fedutils.base.weights.KAGGLE_INPUT", tree / "input")


@pytest.fixture(autouse=True)
def tree(tmp_path, monkeypatch):
    """A Kaggle of the test's own, with nothing attached."""
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)
    move_kaggle(monkeypatch, tmp_path / "kaggle")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "kaggle/input").mkdir(parents=True)
    return tmp_path / "kaggle"


@pytest.fixture
def kit(tmp_path):
    write_kit("somebody", tmp_path / "kit", VALUES)
    return tmp_path / "kit"


def kernels(kit):
    paths = [kit / stem / "kernel-metadata.json" for stem in NOTEBOOKS]
    return [json.loads(path.read_text()) for path in paths]


# The kit.


def test_each_notebook_is_a_kernel_that_kaggle_takes(kit):
    for stem, about in zip(NOTEBOOKS, kernels(kit), strict=True):
        assert about["id"] == f"somebody/{slug(about['title'])}" and 6 <= len(about["title"]) <= 50
        assert (about["language"], about["kernel_type"]) == ("python", "notebook")
        assert about["code_file"] == f"{stem}.ipynb"
        nbformat.validate(nbformat.read(kit / stem / about["code_file"], as_version=4))
        assert about["is_private"] is True and about["enable_internet"] is False


def test_only_03_and_04_ask_for_a_gpu_and_for_one_that_torch_can_use(kit):
    assert [about["enable_gpu"] for about in kernels(kit)] == [False, False, True, True]
    shapes = [about.get("machine_shape") for about in kernels(kit)]
    assert shapes == [None, None, "NvidiaTeslaT4", "NvidiaTeslaT4"]


def test_each_kernel_reads_the_one_before_and_04_the_films_of_02_too(kit):
    ids = [about["id"] for about in kernels(kit)]
    sources = [about["kernel_sources"] for about in kernels(kit)]
    assert sources == [[], ids[:1], ids[1:2], [ids[2], ids[1]]]
    data = {"nih-chest-xrays/data", "somebody/fedutils", "somebody/resnet-34-imagenet-weights"}
    assert all(set(about["dataset_sources"]) == data for about in kernels(kit))


def test_both_data_sets_are_described_as_kaggle_wants(kit):
    for folder in ("fedutils", "resnet-34-imagenet-weights"):
        about = json.loads((kit / folder / "dataset-metadata.json").read_text())
        assert about["id"] == f"somebody/{folder}" == f"somebody/{slug(about['title'])}"
        assert 6 <= len(about["title"]) <= 50 and 6 <= len(folder) <= 50
        assert len(about["licenses"]) == 1 and about["licenses"][0]["name"]


def test_the_data_set_holds_the_package_as_it_is_now(kit):
    held = contents(kit / "fedutils/fedutils", "*")
    held = {path: content for path, content in held.items() if path.suffix != ".md"}
    assert held == {p.relative_to(PACKAGE): p.read_bytes() for p in package_files()}
    assert {path.parts[0] for path in held if len(path.parts) > 1} == wings()


def contents(folder, pattern):
    """Return the content of each file at any depth below a folder, by its path from there."""
    files = (path for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def wings():
    """Return the names of the folders of the package that hold rooms."""
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_parameters_go_into_the_cells_and_the_profile_does_not_depend_on_a_gpu(kit):
    cells = {}
    for stem in NOTEBOOKS:
        node = nbformat.read(kit / stem / f"{stem}.ipynb", as_version=4)
        cells[stem] = next(
            c.source for c in node.cells if "parameters" in c.metadata.get("tags", [])
        )
        exec(cells[stem], {})
    for stem in NOTEBOOKS[:3]:
        assert 'profile: str = "kaggle"  # auto, demo' in cells[stem]
    assert "max_films: int = 500  # at most" in cells["02_preprocess"]
    assert "max_films = 500" in cells["03_federated_train"]
    assert "max_hours: float = 11.0  #" in cells["03_federated_train"]


def test_a_kernels_gpus_are_not_this_machines(tmp_path):
    write_kit("somebody", tmp_path / "kit", {"device": "cuda:0,cuda:1", "weights": "none"})
    source = (tmp_path / "kit/03_federated_train/03_federated_train.ipynb").read_text()
    assert 'device = \\"cuda:0,cuda:1\\"' in source and 'weights = \\"none\\"' in source
    assert str(tmp_path) not in source and str(PACKAGE.parent) not in source


def test_the_commands_send_every_folder_in_order(tmp_path, capsys):
    assert main(["kaggle", "--user", "somebody", "--out", str(tmp_path / "a kit")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
    folders = [re.search(r"create -p '(.*?)'|push -p '(.*?)'", line) for line in lines]
    names = [(found[1] or found[2]).rpartition("/")[2] for found in folders if found]
    assert names == ["resnet-34-imagenet-weights", "fedutils", *NOTEBOOKS]
    assert lines[0].startswith("curl ") and "resnet34-b627a593.pth" in lines[0]
    assert {path.name for path in (tmp_path / "a kit").iterdir()} == set(names)


def test_weights_on_this_machine_are_put_into_the_kit(tmp_path):
    cache = tmp_path / "hub/checkpoints/resnet34-b627a593.pth"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"weights")
    for _ in range(2):
        lines = write_kit("somebody", tmp_path / "kit", {})
        assert not [line for line in lines if line.startswith("curl")]
    copied = tmp_path / "kit/resnet-34-imagenet-weights/resnet34-b627a593.pth"
    assert copied.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "some/body", "--out", "kit"], "--user some/body: expected your name"),
        (["--user", "somebody", "--out", "full"], "--out full: holds other files"),
        (
            ["--user", "somebody", "--out", "kit", "-p", "round=3"],
            "unknown parameter 'round'; did you mean rounds?",
        ),
        (["--user", "somebody", "--out", "kit", "-p", "alpha=0"], "alpha=0.0: allowed is"),
        *(
            (["--user", "somebody", "--out", "kit", "-p", given], said)
            for given, said in (
                ("work_dir=results", "work_dir: kernels find attached films"),
                ("data_dir=films", "data_dir: kernels find attached films"),
                (
                    "weights=mine.pth",
                    "weights='mine.pth': kernels take imagenet, attached, or none",
                ),
                ("device=banana", "device='banana': expected auto"),
                ("device=mps", "device='mps': expected cpu or cuda"),
            )
        ),
    ],
)
def test_a_kit_that_cannot_be_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/film.png").touch()
    assert main(["kaggle", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "kit").exists() and len(list((tmp_path / "full").iterdir())) == 1


def test_a_second_kit_leaves_no_module_that_is_gone(kit):
    gone = [kit / "fedutils/fedutils" / name for name in ("gone.py", "films/gone.py")]
    for path in gone:
        path.touch()
    write_kit("somebody", kit, {"rounds": "3"})
    assert not [path for path in gone if path.exists()]
    assert "rounds: int = 3 " in (kit / "03_federated_train/03_federated_train.ipynb").read_text()


# What another kernel wrote.

MOUNTS = ["earlier/work", "notebooks/somebody/earlier/work"]


def attach(work, tree, mount):
    """Mount the work folder of an ended session as a kernel's output."""
    (tree / "input" / mount).parent.mkdir(parents=True, exist_ok=True)
    return work.rename(tree / "input" / mount)


@pytest.mark.parametrize("mount", MOUNTS)
def test_prepared_films_are_read_from_the_work_folder_first_then_from_what_is_attached(
    tmp_path, tree, mount
):
    settings = tiny_settings(tmp_path / "work")
    assert settings.prepared == tmp_path / "work/prepared"
    tiny_films(tmp_path / "old")
    attached = attach(tmp_path / "old", tree, mount)
    assert settings.prepared == attached / "prepared"
    tiny_films(tmp_path / "work")
    assert settings.prepared == tmp_path / "work/prepared"


@pytest.mark.parametrize("mount", MOUNTS)
def test_an_attached_run_is_copied_and_the_attached_one_is_left_alone(tmp_path, tree, mount):
    films = tiny_films(tmp_path / "old")
    Training(tiny_settings(tmp_path / "old", lr=0.02), films)
    attached = attach(tmp_path / "old", tree, mount)
    before = {path: path.stat().st_mtime_ns for path in attached.rglob("*")}
    settings = read_run(str(tmp_path / "work"))
    assert (settings.lr, settings.run) == (0.02, tmp_path / "work/runs/run")
    assert settings.prepared == attached / "prepared"
    (settings.run / "evaluation").mkdir()
    assert {path: path.stat().st_mtime_ns for path in attached.rglob("*")} == before
    with pytest.raises(InputError, match=r"and none in .*run notebook 03"):
        read_run(str(tmp_path / "work"), "other")


def test_of_several_runs_the_latest_counts_whether_it_is_attached_or_here(tmp_path, tree):
    films = tiny_films(tmp_path / "old")
    for name in ("B", "A"):
        Training(tiny_settings(tmp_path / "old", name=name), films)
    attach(tmp_path / "old", tree, "earlier/work")
    assert read_run(str(tmp_path / "work")).name == "A"
    assert read_run(str(tmp_path / "work"), "B").name == "B"
    Training(tiny_settings(tmp_path / "work", name="C"), films)
    assert read_run(str(tmp_path / "work")).name == "C"
    (tmp_path / "work/runs/A/kept").touch()
    fetch_runs(tmp_path / "work")
    assert (tmp_path / "work/runs/A/kept").exists()


def test_a_copy_that_was_killed_is_made_again_and_never_taken_for_a_run(
    tmp_path, tree, monkeypatch
):
    films = tiny_films(tmp_path / "old")
    Training(tiny_settings(tmp_path / "old"), films)
    attach(tmp_path / "old", tree, "earlier/work")
    (tmp_path / "work/runs/run").mkdir(parents=True)  # as notebook 03 may have left it

    def kill(source, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", kill)
        with pytest.raises(KeyboardInterrupt):
            fetch_runs(tmp_path / "work")
    assert not list(tmp_path.glob("work/runs/*/*"))
    fetch_runs(tmp_path / "work")
    copied = json.loads((tmp_path / "work/runs/run/config.json").read_text())
    assert copied["fingerprint"] == "tiny"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["runs"]


def test_a_session_that_max_hours_ends_goes_on_in_the_next_with_the_same_hashes(
    tmp_path, tree, monkeypatch
):
    changes = {"rounds": 2, "strategy": "fedavgm", "tracked": "fc"}
    whole = Training(tiny_settings(tmp_path / "whole", **changes), tiny_films(tmp_path / "whole"))
    expected = whole.train()
    films = tiny_films(tmp_path / "first")

    class Clock:
        """Every look at the clock is 22 minutes later: the session ends after one round."""

        def __init__(self):
            self.now, self.perf_counter = 0.0, training.time.perf_counter

        def monotonic(self):
            self.now += 1320.0
            return self.now

    with monkeypatch.context() as patch:
        patch.setattr(training, "time", Clock())
        first = tiny_settings(tmp_path / "first", max_hours=1.0, **changes)
        stopped = Training(first, films).train()
    assert stopped["round"].max() == 1 and not (first.run / "finished.json").exists()
    attach(tmp_path / "first", tree, MOUNTS[1])

    settings = tiny_settings(tmp_path / "work", max_hours=1.0, **changes)
    fetch_runs(settings.work_dir)
    history = Training(settings, films).train()
    fixed = ["arm", "seed", "round", "client", "val_loss", "state_sha256"]
    pd.testing.assert_frame_equal(history[fixed], expected[fixed])
    model = "global_model.safetensors"
    assert (settings.run / model).read_bytes() == (whole.run / model).read_bytes()


# What a session on Kaggle is told.


def fake_gpu(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75"])


def test_a_gpu_without_weights_is_the_demo_and_says_so_with_the_way_out(monkeypatch):
    def no_network(*arguments, **named):
        raise OSError("Name or service not known")

    fake_gpu(monkeypatch, "Tesla T4", (7, 5))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    with pytest.warns(UserWarning, match=r"demo here.*not known.*resnet34-b627a593.pth.*=kaggle"):
        assert find_profile() == "demo"


def test_kaggle_without_a_gpu_is_the_demo_and_says_so(tree, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_profile() == "demo" and not recwarn.list
    (tree / "working").mkdir()
    with pytest.warns(UserWarning, match=r"the demo here.*no GPU.*profile=kaggle"):
        assert find_profile() == "demo"


def test_films_prepared_at_another_size_are_refused(tmp_path):
    films = tiny_films(tmp_path)
    report = {"fingerprint": "tiny", "image_size": 64}
    (tmp_path / "prepared/report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="films of 64 pixels, but image_size is 32"):
        Training(tiny_settings(tmp_path), films)


def test_a_p100_stops_notebook_03_before_anything_touches_it(tmp_path, monkeypatch):
    fake_gpu(monkeypatch, "Tesla P100-PCIE-16GB", (6, 0))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    node = read_notebook(FOLDER, NOTEBOOKS[2])
    done, scope = [], {}
    with pytest.raises(InputError, match=r"Tesla P100-PCIE-16GB .sm_60.*choose GPU T4 x2"):
        for cell in (cell for cell in node.cells if cell.cell_type == "code"):
            exec(cell.source, scope)
            done.append(cell.source)
    assert len(done) == 3 and done[2].endswith("fedutils.print_environment()")
    assert not list(tmp_path.glob("*/runs")) and not torch.cuda.is_initialized()


@pytest.mark.parametrize("finished", [True, False])
def test_notebook_03_says_whether_all_rounds_are_done_or_max_hours_stopped_it(tmp_path, finished):
    node = read_notebook(FOLDER, NOTEBOOKS[2])
    (cell,) = (cell.source for cell in node.cells if "training.train(show" in cell.source)
    said = []
    live = SimpleNamespace(update=said.append)
    scope = {
        "display": lambda shown, display_id: live,
        "Markdown": str,
        "settings": SimpleNamespace(run=tmp_path),
        "training": SimpleNamespace(train=lambda *shows: None),
    }
    if finished:
        (tmp_path / "finished.json").touch()
    exec(cell, scope)
    assert ("All rounds are done" in said[0], "Stopped at `max_hours`" in said[0]) == (
        finished,
        not finished,
    )


def test_the_copy_of_fedutils_is_named(tree, monkeypatch, tmp_path):
    assert find_copy() == "beside the notebooks"
    monkeypatch.setattr(device, "ROOT_MARKER", "none")
    monkeypatch.chdir(tmp_path)
    assert find_copy() == "installed"
    attached = tree / "input/datasets/somebody/fedutils/fedutils"
    monkeypatch.setattr(device, "PACKAGE", attached)
    assert find_copy() == f"attached, {attached}"


def test_results_go_to_kaggles_output_folder(tree):
    (tree / "working").mkdir()
    assert read_parameters({"profile": "demo"}).work_dir == str(tree / "working/work")


def first_cells():
    """Return the cell of each notebook that finds fedutils, without repeats."""
    nodes = [read_notebook(FOLDER, stem) for stem in NOTEBOOKS]
    return {next(c.source for c in node.cells if "import fedutils" in c.source) for node in nodes}


def test_all_notebooks_begin_with_the_same_cell_of_three_lines():
    (first,) = first_cells()
    lines = first.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < 110
    assert lines[-1] == "import fedutils"


@pytest.mark.parametrize(
    "package",
    [
        "fedutils/fedutils",
        "fedutils",
        "datasets/somebody/fedutils/fedutils",
        "datasets/somebody/fedutils",
        "datasets/somebody/a-checkout/fedutils",
    ],
)
def test_the_first_cell_finds_the_package_beside_the_notebooks_then_attached_then_installed(
    tree, tmp_path, monkeypatch, package
):
    def make(package):
        (package / "base").mkdir(parents=True)
        (package / "__init__.py").touch()
        return package

    def found():
        """Return the package that the cell's last line would import in a fresh Python."""
        monkeypatch.setattr(sys, "path", [str(installed.parent)])
        monkeypatch.setattr(sys, "path_importer_cache", {})
        exec(next(iter(first_cells())), {})
        return Path(PathFinder.find_spec("fedutils", sys.path).origin).resolve().parent

    installed = make(tmp_path / "site-packages/fedutils")
    (tree / "working").mkdir()
    monkeypatch.chdir(tree / "working")  # where a kernel on Kaggle runs
    assert found() == installed
    attached = make(tree / "input" / package)
    assert found() == attached
    beside = make(tree / "fedutils")
    assert found() == beside


def test_the_first_cell_takes_no_other_folder_of_that_name_for_the_package(tmp_path, monkeypatch):
    package = tmp_path / "fedutils/fedutils"  # in a checkout of the same name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "fedutils")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "fedutils")])  # as a kernel has its folder
    exec(next(iter(first_cells())), {})
    assert Path(PathFinder.find_spec("fedutils", sys.path).origin).parent == package


def test_the_first_cell_looks_at_no_film_of_what_is_attached(tree, monkeypatch):
    films = tree / "input/data/images_001/images"
    films.mkdir(parents=True)
    (tree / "working").mkdir()
    monkeypatch.chdir(tree / "working")
    monkeypatch.setattr(sys, "path", [])
    looked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(Path(path)) or scandir(path))
    exec(next(iter(first_cells())), {})
    assert looked and films.resolve() not in {path.resolve() for path in looked}
