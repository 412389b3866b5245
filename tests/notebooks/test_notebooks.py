"""The four notebooks, executed by papermill as a user does: on a phantom, and on real films."""

import ast
import json
import re
import sys
from contextlib import nullcontext

import nbformat
import pandas as pd
import papermill
import pytest
from ownfilms import write_films
from papermill.exceptions import PapermillExecutionError
from safetensors.torch import load_file
from tiny import tiny_films
from torchvision.models import resnet34

from fedutils.__main__ import main
from fedutils.base.errors import InputError
from fedutils.base.parameters import convert
from fedutils.batch.notebook import FOLDER, NOTEBOOKS, read_notebook
from fedutils.batch.trained import read_evaluated
from fedutils.films.phantom.write import write_phantom
from fedutils.films.read import read_folder
from fedutils.films.split import split_patients
from fedutils.settings import FIELDS, read_parameters

QUICK = ["-p", "image_size=32", "-p", "rounds=1", "-p", "device=cpu", "--name", "quick"]
ALL_ARMS = ["-p", "arms=federated,centralised,local", "-p", "num_clients=3"]
ALL_ARMS += ["-p", "weight_decay=0.0002"]  # no cell shows it


def run(work, data, *options):
    command = ["run", "--profile", "demo", "--work", str(work), "--data", str(data)]
    return main([*command, *QUICK, *options])


def texts(work, stem):
    """All text that a reader of an executed notebook sees below its code."""
    node = nbformat.read(work / "notebooks" / "quick" / f"{stem}.ipynb", as_version=4)
    outputs = [output for cell in node.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    return "\n".join(
        [o.get("text", "") for o in outputs] + [d.get("text/markdown", "") for d in data]
    )


def shown(stem):
    """The names of the parameters that a notebook's cell shows, as papermill reads them."""
    return list(papermill.inspect_notebook(read_notebook(FOLDER, stem)))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    work = tmp_path_factory.mktemp("phantom")
    data = write_phantom(work / "tiny", patients=60, size=64)
    assert run(work, data, *ALL_ARMS) == 0
    return work


def test_the_notebooks_run_end_to_end_and_leave_what_the_design_names(phantom):
    folder = phantom / "runs" / "quick"
    for name in ("config.json", "history.csv", "clients.csv", "global_model.safetensors"):
        assert (folder / name).is_file(), name
    evaluation = {path.name for path in (folder / "evaluation").iterdir()}
    assert evaluation >= {"predictions.csv.gz", "metrics.csv", "summary.json", "auroc.png"}
    prepared = {path.name for path in (phantom / "prepared").iterdir()}
    assert prepared >= {"images.npy", "index.csv", "boxes.csv", "report.json"}
    for stem in ("01_explore", "02_preprocess", "03_federated_train", "04_evaluate"):
        assert (phantom / "notebooks" / "quick" / f"{stem}.html").stat().st_size < 5e6


def test_everything_made_from_the_phantom_says_phantom(phantom):
    for stem in ("01_explore", "04_evaluate"):
        assert re.search("[Pp]hantom", texts(phantom, stem)), stem
    summary = json.loads((phantom / "runs/quick/evaluation/summary.json").read_text())
    assert all(line.startswith("phantom data") for line in summary["headline"])


def test_every_patient_is_at_one_client_and_in_one_split(phantom):
    clients = pd.read_csv(phantom / "runs/quick/clients.csv")
    assert clients["patient_id"].is_unique and set(clients["split"]) == {"train", "val", "test"}
    index = pd.read_csv(phantom / "prepared/index.csv")
    assert set(index["patient_id"]) == set(clients["patient_id"])
    assert index.groupby("patient_id")["split"].nunique().max() == 1
    assert index["image_index"].is_monotonic_increasing


def test_the_global_model_opens_with_plain_torchvision(phantom):
    resnet34(num_classes=14).load_state_dict(
        load_file(phantom / "runs/quick/global_model.safetensors")
    )


def test_the_notebook_shows_that_the_model_leaves_well(phantom):
    said, card = texts(phantom, "04_evaluate"), (phantom / "runs/quick/MODEL_CARD.md").read_text()
    assert re.search(
        r"torchvision alone and the run differ by at most \S+, which is the same", said
    )
    assert "Trained on phantom films" in card and "Trained on phantom films" in said
    assert "not measurable at this size" in said and "not measurable at this size" in card


def test_calibration_and_operating_points_are_there_for_every_model(phantom):
    folder = phantom / "runs/quick/evaluation"
    models = len(
        pd.read_csv(folder / "predictions.csv.gz").groupby(["arm", "client"], dropna=False)
    )
    assert models > 3
    assert len(pd.read_csv(folder / "calibration.csv")) == models * 15 * 4  # all, three hospitals
    assert len(pd.read_csv(folder / "operating_points.csv")) == models * 14 * 2
    assert {"calibration.png", "gallery.png"} <= {path.name for path in folder.iterdir()}
    hashes = json.loads((folder / "summary.json").read_text())["sha256"]
    assert {"MODEL_CARD.md", "evaluation/calibration.csv", "evaluation/pointing.csv"} <= set(hashes)


def test_a_parameter_that_no_cell_shows_reaches_the_run_and_its_trace(phantom):
    config = json.loads((phantom / "runs/quick/config.json").read_text())
    assert (config["weight_decay"], config["lr"]) == (0.0002, 0.0004)
    assert "weight_decay" not in shown(NOTEBOOKS[2])
    node = nbformat.read(phantom / "notebooks/quick/03_federated_train.ipynb", as_version=4)
    (injected,) = [c.source for c in node.cells if "injected-parameters" in c.metadata["tags"]]
    assert "weight_decay = 0.0002\n" in injected


def test_a_saved_notebook_holds_no_stale_progress(phantom):
    node = nbformat.read(phantom / "notebooks/quick/02_preprocess.ipynb", as_version=4)
    assert "decoding ..." not in texts(phantom, "02_preprocess")
    assert not [o for c in node.cells for o in c.get("outputs", []) if "widget" in json.dumps(o)]


def test_other_prepared_data_are_refused_with_status_2(phantom, capsys):
    report = phantom / "prepared" / "report.json"
    kept = report.read_text()
    report.write_text(json.dumps(json.loads(kept) | {"fingerprint": "0123456789abcdef"}))
    data = phantom / "tiny"
    try:
        assert run(phantom, data, *ALL_ARMS, "--only", "03") == 2
        assert "fingerprint" in capsys.readouterr().err
        assert run(phantom, data, *ALL_ARMS, "--only", "04") == 2
        assert "0123456789abcdef" in capsys.readouterr().err
    finally:
        report.write_text(kept)


def test_more_rounds_go_on_and_another_parameter_under_the_same_name_is_refused(phantom, capsys):
    data, options = phantom / "tiny", ALL_ARMS
    before = pd.read_csv(phantom / "runs/quick/history.csv")
    assert run(phantom, data, *options, "-p", "rounds=2", "--only", "03") == 0
    after = pd.read_csv(phantom / "runs/quick/history.csv")
    assert len(after) == 2 * len(before)
    first = after[after["round"] == 1]["state_sha256"].dropna().tolist()
    assert first == before["state_sha256"].dropna().tolist()
    assert run(phantom, data, *options, "-p", "lr=0.5", "--only", "03") == 2
    assert "is a run with lr=0.0004, not 0.5" in capsys.readouterr().err


# With papermill itself.


def papermill_run(stem, folder, **parameters):
    """Execute a notebook in a folder as a user of papermill does."""
    node, output = read_notebook(FOLDER, stem), folder / f"{stem}.ipynb"
    named = {"cwd": str(folder), "kernel_name": "python3", "progress_bar": False}
    papermill.execute_notebook(node, str(output), parameters, **named)


@pytest.fixture
def run_cells(monkeypatch, tmp_path):
    """Execute a notebook's code in this process, as a session with papermill's cell does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return execute_cells


def execute_cells(stem, **parameters):
    cells = [c.source for c in read_notebook(FOLDER, stem).cells if c.cell_type == "code"]
    injected = "\n".join(["# Parameters", *(f"{k} = {v!r}" for k, v in parameters.items())])
    cells.insert(1, injected)
    scope = {"In": cells}
    for cell in cells:
        exec(cell, scope)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_mistyped_parameter_stops_a_notebook_and_the_nearest_name_is_said(
    stem, tmp_path, run_cells
):
    with pytest.raises(InputError, match=r"^unknown parameter 'ruonds'; did you mean rounds\?$"):
        run_cells(stem, work_dir=str(tmp_path / "work"), ruonds=3)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_name_mistyped_in_the_parameters_cell_is_told_until_it_is_mended(stem, tmp_path):
    cell = next(c.source for c in read_notebook(FOLDER, stem).cells if "work_dir:" in c.source)
    scope = {"work_dir": str(tmp_path), "In": ["", "import fedutils", f"{cell}\nruonds = 3"]}
    read = read_evaluated if stem == NOTEBOOKS[3] else read_parameters
    with pytest.raises(InputError, match="'ruonds'; did you mean rounds"):
        read(scope)
    mended = {"In": [*scope["In"], "%time x = 1", cell], "name": "none"}
    with pytest.raises(InputError, match="no run in") if stem == NOTEBOOKS[3] else nullcontext():
        read(scope | mended | {"device": "cpu", "cache_features": False, "compare": ""})


def test_papermill_itself_says_what_a_notebook_refuses(tmp_path):
    with pytest.raises(PapermillExecutionError) as caught:
        papermill_run(NOTEBOOKS[2], tmp_path, work_dir=str(tmp_path / "work"), ruonds=3)
    assert caught.value.ename == "InputError"
    assert caught.value.evalue == "unknown parameter 'ruonds'; did you mean rounds?"


def test_papermill_may_give_a_known_parameter_that_a_notebook_does_not_show(phantom, tmp_path):
    places = {"data_dir": str(phantom / "tiny"), "work_dir": str(tmp_path / "work")}
    assert not {"rounds", "weight_decay"} & set(shown(NOTEBOOKS[0]))
    papermill_run(NOTEBOOKS[0], tmp_path, **places, rounds=3, weight_decay=0.3)
    assert (tmp_path / "work/explore/checks.csv").is_file()


def test_02_refuses_films_of_which_a_split_is_missing_before_it_decodes_any(tmp_path, run_cells):
    data = write_films(tmp_path / "films")
    table = read_folder(data).table
    for path in table["path"][split_patients(table, 0) == "test"]:
        (data / path).unlink()
    with pytest.raises(InputError, match="patients falls to test"):
        places = {"data_dir": str(data), "work_dir": str(tmp_path / "work")}
        run_cells(NOTEBOOKS[1], **places, profile="demo")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": "train test"}, "falls to val"),
        ({"keep": "train val"}, "falls to test"),
        ({"seed": 4}, "seed=4: .* was prepared with 0"),
        ({"data_dir": "films"}, "data_dir='films': .* was prepared with 'phantom'"),
        ({"max_films": 50}, "max_films=50: .* was prepared with 0"),
    ],
)
def test_03_refuses_what_02_left_if_a_split_is_empty_or_other_films_were_asked_for(
    tmp_path, run_cells, wrong, message
):
    prepared = tmp_path / "work/prepared"
    tiny_films(tmp_path / "work")
    index = pd.read_csv(prepared / "index.csv")
    kept = index["split"].isin(wrong.pop("keep", "train val test").split())
    index[kept].to_csv(prepared / "index.csv", index=False)
    stated = {"data_dir": "phantom", "seed": 0, "max_films": 0, "image_size": 32}
    report = json.loads((prepared / "report.json").read_text()) | {"release": "phantom"} | stated
    (prepared / "report.json").write_text(json.dumps(report))
    write_films(tmp_path / "films")
    given = {"work_dir": str(tmp_path / "work"), "profile": "demo", "image_size": 32} | wrong
    with pytest.raises(InputError, match=message):
        run_cells(NOTEBOOKS[2], **given)
    assert not (tmp_path / "work/runs").exists()


def test_02_says_in_its_report_what_it_prepared_with(phantom):
    report = json.loads((phantom / "prepared/report.json").read_text())
    config = json.loads((phantom / "runs/quick/config.json").read_text())
    for name in ("data_dir", "seed", "max_films", "image_size"):
        assert report[name] == config[name], name


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_parameters_cell_shows_parameters_with_their_defaults_and_papermill_reads_all(stem):
    (cell,) = [c.source for c in read_notebook(FOLDER, stem).cells if c.metadata.get("tags")]
    scope = {}
    exec(cell, scope)
    names = list(scope["__annotations__"])
    assert shown(stem) == names and len(names) == cell.count("\n") + 1 <= 16
    assert all(re.search(rf"(?m)^{name}: .* = .*  # \w", cell) for name in names)
    for name in names:
        assert scope["__annotations__"][name] is type(FIELDS[name].default)
        assert convert(FIELDS[name], scope[name]) == FIELDS[name].default


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_a_notebook_run_twice_in_a_session_keeps_its_parameters(stem):
    """No cell but the first gives another meaning to the name of a parameter."""
    cells = [c for c in read_notebook(FOLDER, stem).cells if c.cell_type == "code"]
    others = [ast.parse(cell.source) for cell in cells if not cell.metadata.get("tags")]
    parts = [part for tree in others for part in ast.walk(tree) if isinstance(part, ast.Name)]
    assert not [p.id for p in parts if isinstance(p.ctx, ast.Store) and p.id in FIELDS]


# Real films, and films of one's own.


def test_real_films_at_1024_pixels(nih_test_data, tmp_path):
    """80 films, two of them RGBA, a comma at the end of each line, lists, boxes, `Infiltrate`."""
    assert run(tmp_path, nih_test_data / "nih_sample") == 0
    report = json.loads((tmp_path / "prepared" / "report.json").read_text())
    assert (report["films"], report["patients"]) == (80, 51)
    assert report["modes"] == {"L": 78, "RGBA": 2}
    assert report["splits"]["test"]["films"] == 16 and report["quarantined"] == {}
    listed = (nih_test_data / "nih_sample" / "BBox_List_2017.csv").read_text().splitlines()[1:]
    assert report["boxes"] == len(listed) == len(pd.read_csv(tmp_path / "prepared" / "boxes.csv"))
    assert "**80 films of" in texts(tmp_path, "01_explore")


def test_real_films_without_lists_or_boxes(nih_test_data, tmp_path):
    """690 films of 249 patients at 64 pixels: patients are split here, not by NIH."""
    assert run(tmp_path, nih_test_data / "nih64") == 0
    report = json.loads((tmp_path / "prepared" / "report.json").read_text())
    assert (report["films"], report["patients"], report["boxes"]) == (690, 249, 0)
    assert report["release"] == "2020" and report["modes"] == {"RGB": 669, "RGBA": 21}
    assert set(report["splits"]) == {"train", "val", "test"}
    assert "No published figure is drawn in" in texts(tmp_path, "04_evaluate")


def test_films_of_ones_own_without_most_columns(tmp_path):
    """PNG and JPEG, six findings with gaps; no boxes, lists, ages, views, sexes or scanners."""
    data = write_films(tmp_path / "own", patients=30)
    mapping = (data / "films.toml").read_text()
    for name in ("follow_up", "view", "age", "sex", "scanner"):
        mapping = re.sub(rf"^{name} = .*\n", "", mapping, flags=re.MULTILINE)
    (data / "films.toml").write_text(mapping)
    assert run(tmp_path, data) == 0
    report = json.loads((tmp_path / "prepared" / "report.json").read_text())
    assert (report["films"], report["release"], report["boxes"]) == (60, "own", 0)
    explored = texts(tmp_path, "01_explore")
    assert "views unknown" in explored and "Not there: split lists, boxes, scanners" in explored
    metrics = pd.read_csv(tmp_path / "runs/quick/evaluation/metrics.csv").set_index("finding")
    assert len(set(metrics.index)) == 6 + 1 and "Hernia" not in metrics.index
    assert metrics.loc["mean"].query("test_set == 'all'")["value"].isna().all()
    report = (tmp_path / "notebooks" / "quick" / "04_evaluate.html").read_text()
    assert "The test set is too small to judge anything" in report and "shown to be" not in report
