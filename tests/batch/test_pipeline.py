"""The pipeline, proved on four stand-in notebooks that leave the files that the real ones leave."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import jupytext
import pytest
import torch
from ownfilms import write_films
from tiny import tiny_films
from torchvision.models import resnet34

from fedutils import __main__, batch
from fedutils.base import files
from fedutils.base.errors import NotebookFailed
from fedutils.base.files import PACKAGE
from fedutils.batch import notebook
from fedutils.batch.notebook import NOTEBOOKS, read_notebook
from fedutils.batch.run import Step, run
from fedutils.films.read import read_folder
from fedutils.films.split import split_patients

HEADER = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A stand-in

# %% tags=["parameters"]
data_dir: str = ""  # folder of the films
work_dir: str = "../work"  # where results go
name: str = "demo"  # name of the run
"""
START = """
# %%
from pathlib import Path
work = Path(work_dir)
run = work / "runs" / name
for folder in (work / "prepared", run / "models", run / "evaluation"):
    folder.mkdir(parents=True, exist_ok=True)
"""
BODIES = {
    "01_explore": """
# %%
print("films explored")
""",
    "02_preprocess": """
# %%
(work / "prepared/report.json").write_text(f'{{"fingerprint": "{seed}-{image_size}"}}')
(work / "prepared/index.csv").write_text("image_index")
""",
    "03_federated_train": """
# %%
for number in range(1, rounds + 1):
    print("round", number)
(run / "config.json").write_text("{}")  # as of a run whose parameters never differ
(run / "history.csv").write_text("arm,seed,client,round,val_loss,val_auroc,data\\n" + "".join(
    f"federated,{s},,{rounds},0.5,{lr + s},{(work / 'prepared/report.json').stat().st_size}\\n"
    for s in (0, 1)))
(run / "models/federated.safetensors").write_text("weights")
(run / "finished.json").write_text("") if not max_hours else (run / "finished.json").unlink(True)
""",
    "04_evaluate": """
# %%
(run / "evaluation/summary.json").write_text('{"headline": ["federated AUROC 0.75", "local 0.70"]}')
print("mean AUROC", 0.75)
""",
}
PARAMETERS = {
    "01_explore": "seed: int = 0\n",
    "02_preprocess": "seed: int = 0\nimage_size: int = 0  # pixels (image_size=64 in the demo)\n",
    "03_federated_train": "rounds: int = 2\nlr: float = 1e-3\nmax_hours: float = 0.0\n",
    "04_evaluate": 'compare: str = ""\n',
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with stand-in notebooks; the working folder is its root."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for stem in NOTEBOOKS:
        (folder / f"{stem}.py").write_text(HEADER + PARAMETERS[stem] + START + BODIES[stem])
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE.parent))
    monkeypatch.setattr(notebook, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def executed(monkeypatch):
    """Execute in this process instead of in a kernel, and name what was executed."""
    names = []

    def execute(node, output, parameters, cwd):
        names.append(output.stem[:2])
        scope = {}
        for cell in (cell for cell in node.cells if cell.cell_type == "code"):
            exec(cell.source, scope)
            if "parameters" in cell.metadata.get("tags", []):
                scope |= parameters
        for path in (output, output.with_suffix(".html")):
            path.write_text(f"{parameters} {names}")

    monkeypatch.setattr(batch.run, "execute", execute)
    return names


def command(*arguments):
    """Call the command line in this process, under a given name of the run."""
    return __main__.main(["run", "--profile", "demo", "--name", "A", "--work", "work", *arguments])


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def again(executed, *arguments):
    """Call the command line again and tell which notebooks it executed."""
    executed.clear()
    assert command(*arguments) == 0
    return executed


def break_cell(project, line, stem="02_preprocess"):
    edit(project / f"notebooks/{stem}.py", "\nfrom pathlib", f"\n{line}\nfrom pathlib")


# What is known to be wrong before any notebook starts.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "round=3"], "unknown parameter 'round'; did you mean rounds?"),
        (["-p", "ruonds=3"], "unknown parameter 'ruonds'; did you mean rounds?"),
        (["-p", "colour=red"], "unknown parameter 'colour'; `python -m fedutils parameters` lists"),
        (["-p", "rounds=many"], "rounds='many': expected int"),
        (["-p", "rounds=-1"], "rounds=-1: allowed is 1 to"),
        (["-p", "rounds"], "-p rounds: expected KEY=VALUE"),
        (["--profile", "fast"], "profile='fast': allowed are auto, demo, kaggle"),
        (["--name", "../B"], "name='../B': expected letters"),
        (["--only", "02", "-p", "rounds=9"], "rounds: notebook 02 does not heed it"),
        (["--only", "03,07"], "no notebook '07'; known: 01, 02, 03, 04"),
        (["--data", "absent"], "absent"),
        (["--data", "empty"], "empty"),
        (["--data", "unlabelled"], "column"),
        (["--work", "notebooks/01_explore.py"], "work_dir: .* cannot be made"),
    ],
)
def test_unusable_input_is_one_line_and_no_notebook_starts(
    project, executed, capsys, arguments, message
):
    (project / "empty").mkdir()
    (project / "unlabelled").mkdir()
    (project / "unlabelled/Data_Entry_2017.csv").write_text("Image Index,Patient ID\na.png,1\n")
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedutils: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert executed == [] and not (project / "work").exists()


def test_each_notebook_gets_those_resolved_parameters_that_it_declares(project, executed):
    folder = project / "notebooks"
    settings = run({"work_dir": "work", "profile": "demo"})
    node = read_notebook(folder, "02_preprocess")
    step = Step("02_preprocess", node, settings, "", ())
    places = {"data_dir": "", "work_dir": str(project / "work"), "name": settings.name}
    assert step.parameters == places | {"seed": 0, "image_size": 64}
    assert len(settings.name) == 8


def test_each_notebook_gets_what_was_given_and_it_reads_though_its_cell_shows_it_not(
    project, executed
):
    given = {"weight_decay": "0.3", "max_films": "90", "rounds": "3", "device": "cpu"}
    settings = run({"work_dir": "work", "profile": "demo"} | given)
    extra = {}
    for stem in NOTEBOOKS:
        node = read_notebook(project / "notebooks", stem)
        step = Step(stem, node, settings, "", tuple(given))
        shown = notebook.declared(node)
        extra[stem[:2]] = {k: v for k, v in step.parameters.items() if k not in shown}
    prepared = {"max_films": 90}
    assert extra == {
        "01": {},
        "02": prepared,
        "03": prepared | {"weight_decay": 0.3, "device": "cpu"},
        "04": {"device": "cpu"},
    }


# A grid of runs.


def sweep(*arguments):
    """Call `sweep` on the command line, in this process."""
    return __main__.main(["sweep", "--profile", "demo", "--work", "work", *arguments])


def test_a_sweep_prepares_once_and_runs_every_combination(project, executed):
    assert sweep("lr=0.1|0.2", "rounds=1|2", "--name", "S") == 0
    assert executed == ["01", "02", *["03", "04"] * 4]
    names = {path.name for path in (project / "work/runs").iterdir()}
    assert names == {"S-0.1-1", "S-0.1-2", "S-0.2-1", "S-0.2-2"}
    assert (
        "'S-0.1-1,S-0.1-2,S-0.2-1'"
        in (project / "work/notebooks/S-0.2-2/04_evaluate.ipynb").read_text()
    )
    executed.clear()
    assert sweep("lr=0.1|0.2", "rounds=1|2", "--name", "S") == 0 and executed == []


def test_a_sweep_without_a_name_names_each_run_by_its_parameters(project, executed):
    assert sweep("lr=0.1|0.2", "--only", "02,03") == 0
    assert executed == ["02", "03", "03"]
    assert len(list((project / "work/runs").iterdir())) == 2


def test_a_sweep_ends_with_what_each_run_reached_on_validation(project, executed, capsys):
    assert sweep("lr=0.1|0.2", "--name", "S") == 0
    table = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    assert table[0] == "| lr | run | arm | models | AUROC | loss | best round |"
    assert table[2:] == [
        "| 0.1 | S-0.1 | federated | 2 | 0.600 | 0.500 | 4.0 |",
        "| 0.2 | S-0.2 | federated | 2 | 0.700 | 0.500 | 4.0 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=0.1|many"], "lr='many': expected float"),
        (["lr"], "sweep lr: expected KEY=VALUE"),
        (["image_size=32|64"], "sweep image_size: prepares other films"),
        (["lr=0.1|0.2", "-p", "lr=1"], "sweep lr: .* is given already"),
        (["round=1|2"], "unknown parameter 'round'; did you mean rounds?"),
        (["rounds=1|2"], "sweep rounds: 2 of these runs would be one, .*; give a --name"),
        (["lr=0.1|0.1", "--name", "S"], "sweep lr: 2 of these runs would be one, S-0.1"),
        (["lr=0.1", "lr=0.2|0.3"], "sweep lr=0.1 lr=0.2|0.3: a parameter is there twice"),
    ],
)
def test_an_unusable_sweep_is_one_line_and_no_run_starts(
    project, executed, capsys, arguments, message
):
    assert sweep(*arguments) == 2
    assert re.search(message, capsys.readouterr().err) and executed == []


def test_a_run_that_fails_costs_the_sweep_that_run_only(project, executed, capsys, monkeypatch):
    execute = batch.run.execute

    def fail_once(node, output, parameters, cwd):
        if parameters.get("lr") == 0.1:
            raise NotebookFailed("03 failed")
        execute(node, output, parameters, cwd)

    monkeypatch.setattr(batch.run, "execute", fail_once)
    assert sweep("lr=0.1|0.2") == 1
    assert executed == ["01", "02", "03", "04"]
    assert "lr=0.1: 03 failed" in capsys.readouterr().err


# What is executed again, and what is not.


def test_all_run_once_and_then_are_skipped(project, executed, capsys):
    assert again(executed) == ["01", "02", "03", "04"]
    assert again(executed) == []
    assert capsys.readouterr().out.count("skipped (unchanged)") == 4
    assert again(executed, "--force") == ["01", "02", "03", "04"]


def test_a_parameter_repeats_the_notebooks_that_depend_on_it(project, executed):
    again(executed)
    assert again(executed, "-p", "lr=0.01") == ["03", "04"]
    assert again(executed, "-p", "lr=0.01", "-p", "image_size=128") == ["02", "03", "04"]


def test_a_parameter_that_no_cell_shows_repeats_what_reads_it(project, executed):
    again(executed)
    assert again(executed, "-p", "weight_decay=0.3") == ["03"]
    assert again(executed, "-p", "weight_decay=0.3") == []
    assert again(executed) == ["03"]


def test_weights_of_another_content_repeat_the_training(project, executed):
    def write():
        torch.save(resnet34().state_dict(), project / "w.pth")

    write()
    assert again(executed, "-p", "weights=w.pth") == ["01", "02", "03", "04"]
    assert again(executed, "-p", "weights=w.pth") == []
    write()
    assert again(executed, "-p", "weights=w.pth") == ["03"]


def test_a_compared_run_that_was_evaluated_anew_is_compared_anew(project, executed):
    again(executed, "--name", "B")
    assert again(executed, "-p", "compare=B, B,") == ["01", "02", "03", "04"]
    assert again(executed, "-p", "compare=B, B,") == []
    edit(project / "work/runs/B/evaluation/summary.json", "0.75", "0.76")
    assert again(executed, "-p", "compare=B, B,") == ["04"]
    assert again(executed) == ["04"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seed=3", "seed=3: run A was trained with 0; choose another run"),
        ("max_films=60", "max_films=60: run A was trained with 0"),
        ("lr=0.5", "lr=0.5: run A was trained with"),
        ("rounds=9", "rounds=9: run A was trained with 4"),
        ("profile=kaggle", "=224: run A was trained with 64"),
        ("max_hours=3", "max_hours: only training heeds it, notebook 03"),
        ("min_clients=2", "min_clients: only training heeds it"),
    ],
)
def test_04_alone_refuses_what_its_run_was_not_trained_with(
    project, executed, capsys, given, message
):
    settings = run({"work_dir": "work", "profile": "demo", "name": "A"})
    config = json.dumps(settings.identity())
    (project / "work/runs/A/config.json").write_text(config)
    assert again(executed, "--only", "04") == ["04"]
    same = ["-p", "seed=0", "-p", f"rounds={settings.rounds}", "--profile", "demo"]
    assert again(executed, "--only", "04", *same) == []
    capsys.readouterr()
    assert command("--only", "04", "-p", given) == 2 and executed == []
    assert message in capsys.readouterr().err


def test_changed_code_of_a_notebook_repeats_it(project, executed):
    again(executed)
    edit(project / "notebooks/03_federated_train.py", '"weights"', '"other weights"')
    assert again(executed) == ["03", "04"]
    edit(project / "notebooks/03_federated_train.py", "# A stand-in", "# Prose")
    assert again(executed) == []


ROOMS = {
    "the root": "fedavg.py",
    "base": "base/rng.py",
    "batch": "batch/run.py",
    "evidence": "evidence/words.py",
    "films": "films/split.py",
    "phantom": "films/phantom/chest.py",
    "network": "network/messages.py",
    "plots": "plots/style.py",
    "privacy": "privacy/ledger.py",
    "training": "training/arms.py",
}


def test_every_wing_has_a_room_below():
    wings = {path.parent for path in PACKAGE.rglob("__init__.py")}
    assert {(PACKAGE / room).parent for room in ROOMS.values()} == wings


TABLES = {
    "films/phantom/cases.toml": ("share = 0.103", "share = 0.104"),
    "batch/report.html.j2": ("60rem", "61rem"),
    "plots/style.mplstyle": ("font.size: 9.5", "font.size: 9"),
}


@pytest.mark.parametrize(
    ("room", "change"), [*((room, ("def ", "def  ")) for room in ROOMS.values()), *TABLES.items()]
)
def test_changed_code_of_fedutils_repeats_all(project, executed, monkeypatch, capsys, room, change):
    again(executed)
    shutil.copytree(PACKAGE, project / "fedutils")
    monkeypatch.setattr(files, "PACKAGE", project / "fedutils")
    assert again(executed) == []
    assert capsys.readouterr().out.count("skipped (unchanged)") == 4
    edit(project / "fedutils" / room, *change)
    assert again(executed) == ["01", "02", "03", "04"]
    assert "skipped" not in capsys.readouterr().out
    assert again(executed) == []


def test_an_output_that_is_missing_or_different_is_made_again(project, executed):
    again(executed)
    (project / "work/prepared/report.json").write_text('{"fingerprint": "of another run"}')
    assert again(executed) == ["02"]
    (project / "work/prepared/report.json").write_text("damaged")
    assert again(executed) == ["02"]
    (project / "work/runs/A/models/federated.safetensors").unlink()
    assert again(executed) == ["03"]
    (project / "work/notebooks/A/01_explore.html").unlink()
    assert again(executed) == ["01"]


def test_changed_data_repeats_what_reads_films(project, executed):
    films = write_films(project / "films")
    again(executed, "--data", "films")
    assert again(executed, "--data", "films") == []
    edit(films / "table.csv", ";50;", ";51;")
    assert again(executed, "--data", "films") == ["01", "02"]
    (films / "pictures/new.png").touch()
    assert again(executed, "--data", "films") == ["01", "02"]
    (films / "pictures/new.png").write_bytes(b"the rest of a download")
    assert again(executed, "--data", "films") == ["01", "02"]
    os.utime(films / "pictures/P-00/0.PNG", (1, 1))  # as large as before, and another film
    assert again(executed, "--data", "films") == ["01", "02"]
    (films / "pictures/gone.png").symlink_to("nowhere.png")
    assert again(executed, "--data", "films") == ["01", "02"]
    assert again(executed, "--data", "films") == []


@pytest.mark.parametrize("work", ["films", "films/results", "link"])
def test_what_a_run_wrote_into_the_data_folder_is_no_input(project, executed, work):
    write_films(project / "films")
    (project / "link").symlink_to("films")
    assert again(executed, "--data", "films", "--work", work) == ["01", "02", "03", "04"]
    assert again(executed, "--data", "films", "--work", work) == []


def test_prepared_films_of_another_choice_are_prepared_again_though_they_are_the_same(
    project, executed
):
    again(executed)
    report = project / "work/prepared/report.json"
    edit(report, "{", '{"max_films": 0, ')
    assert again(executed, "--only", "02") == ["02"]


# What the films on hand show to be impossible.


OWN, DRAWN, HERE = (
    ["--data", "films"],
    [],
    ["--only", "03,04"],
)  # the last: as notebook 02 left them


@pytest.mark.parametrize(
    ("source", "parameters", "message"),
    [
        (OWN, "partition=scanner", "60 patients have no pixel spacing"),
        (OWN, "num_clients=70", "num_clients=70: there are .* training patients"),
        (OWN, "aggregation=trimmed", "trim=0.2 of 4 clients cuts off nobody"),
        (OWN, "batch_size=1 image_size=32", "batch_size=1: client-1 has .*one film of 32 pixels"),
        (OWN, "max_films=3", "none of .* patients falls to"),
        (OWN, "compare=B", "no run in .*work/runs/B"),
        (OWN, "weights=bad.pth", "bad.pth'?: .*cannot be read"),
        (OWN, "weights=other.pth", "no ResNet-34 state dict"),
        (DRAWN, "partition=scanner num_clients=9", "num_clients=9: only 5 scanners"),
        (DRAWN, "num_clients=5000", "num_clients=5000: there are .* training patients"),
        (DRAWN, "max_films=4", "none of .* patients falls to"),
        (HERE, "num_clients=60 image_size=32", "num_clients=60: there are 36 training patients"),
        (HERE, "batch_size=11 image_size=32 num_clients=36", "has 1 training film,"),
        (HERE, "seed=3 image_size=32", "seed=3: .* was prepared with 0"),
        (HERE, "max_films=40 image_size=32", "max_films=40: .* was prepared with 0"),
        (HERE, "image_size=48", "image_size=48: .* was prepared with 32"),
        ([*OWN, *HERE], "image_size=32", "data_dir='films': .* was prepared with 'phantom'"),
    ],
)
def test_what_would_stop_a_later_notebook_is_said_before_the_first(
    project, executed, capsys, source, parameters, message
):
    data = write_films(project / "films", patients=60)
    mapping = (data / "films.toml").read_text()
    (data / "films.toml").write_text(re.sub("(?m)^scanner.*$", "", mapping))
    if source[-2:] == HERE:
        tiny_films(project / "work")
        stated = {"fingerprint": "tiny", "data_dir": "phantom", "seed": 0, "max_films": 0}
        report = json.dumps(stated | {"image_size": 32})
        (project / "work/prepared/report.json").write_text(report)
    torch.save({"weight": torch.zeros(1)}, project / "other.pth")
    (project / "bad.pth").write_text("not one")
    pairs = [word for pair in parameters.split() for word in ("-p", pair)]
    assert command(*source, *pairs) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error) and executed == []


@pytest.mark.parametrize("gone", ["train", "val", "test"])
def test_a_split_of_which_all_films_are_missing_stops_a_run_before_it_starts(
    project, executed, capsys, gone
):
    data = write_films(project / "films")
    table = read_folder(data).table
    for path in table["path"][split_patients(table, 0) == gone]:
        (data / path).unlink()
    assert command("--data", "films") == 2 and executed == []
    assert re.search(f"none of .* patients falls to {gone};", capsys.readouterr().err)


def test_a_sweep_of_which_one_run_is_impossible_does_not_begin(project, executed, capsys):
    assert sweep("num_clients=2|5000", "--name", "S") == 2 and executed == []
    assert "num_clients=5000" in capsys.readouterr().err


def test_training_that_stopped_at_its_time_limit_goes_on(project, executed, capsys):
    again(executed, "-p", "max_hours=9")
    assert "Training stopped at max_hours" in capsys.readouterr().out
    assert again(executed, "-p", "max_hours=9") == ["03"]


def test_only_the_chosen_notebooks_run(project, executed):
    assert again(executed, "--only", "02,01") == ["01", "02"]
    assert again(executed, "--only", "03") == ["03"]
    assert again(executed) == ["04"]


def test_a_run_goes_on_at_the_notebook_that_failed(project, executed):
    break_cell(project, "1 / 0", "03_federated_train")
    with pytest.raises(ZeroDivisionError):
        command()
    edit(project / "notebooks/03_federated_train.py", "1 / 0", "pass")
    assert again(executed) == ["03", "04"]


# With real kernels.


def test_a_run_leaves_notebooks_html_and_headline_figures(project, capfd):
    assert command() == 0
    out, err = capfd.readouterr()
    assert err == ""  # nor a word of papermill that no stand-in shows `profile`
    lines = out.splitlines()
    assert re.fullmatch(r"01_explore +done in \d+ s  -> work/notebooks/A/01_explore.html", lines[0])
    assert lines[2:5] == ["03_federated_train  running", "    round 1", "    round 2"]
    assert lines[-2:] == ["federated AUROC 0.75", "local 0.70"]
    assert "Summary: work/runs/A/evaluation/summary.json" in lines
    for stem in NOTEBOOKS:
        html = (project / f"work/notebooks/A/{stem}.html").read_text()
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?(https?:)?//", html)
        assert (
            "viewport" in html and "A stand-in" in html and "name: str" in re.sub("<.*?>", "", html)
        )
    left = sorted(path.name for path in (project / "notebooks").iterdir())
    assert left == [f"{s}.py" for s in NOTEBOOKS]


def test_kernels_inherit_nothing_that_the_shell_asks_of_python_jupyter_and_matplotlib(
    project, monkeypatch
):
    wrong = project / "wrong"
    (wrong / "kernels/python3").mkdir(parents=True)
    spec = '{"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}'
    (wrong / "kernels/python3/kernel.json").write_text(spec)
    (wrong / "profile_default/startup").mkdir(parents=True)
    for path in (wrong / "startup.py", wrong / "profile_default/startup/1.py"):
        path.write_text("print('not asked for')")
    (wrong / "matplotlibrc").write_text("figure.facecolor: red\n")
    asked = {
        "MPLBACKEND": "pdf",
        "MATPLOTLIBRC": wrong / "matplotlibrc",
        "PYTHONWARNINGS": "error",
        "PYTHONSTARTUP": wrong / "startup.py",
        "JUPYTER_PATH": wrong,
        "JUPYTER_RUNTIME_DIR": "/proc/nowhere",
        "IPYTHONDIR": wrong,
    }
    for name, value in asked.items():
        monkeypatch.setenv(name, str(value))
    edit(
        project / "notebooks/01_explore.py",
        'print("films explored")',
        "import warnings; from matplotlib import pyplot as plt\nwarnings.warn('only a warning')\n"
        "plt.plot([1, 2]); print(plt.rcParams['figure.facecolor'])",
    )
    before = dict(os.environ)
    assert command("--only", "01") == 0
    text = (project / "work/notebooks/A/01_explore.ipynb").read_text()
    assert text.count("image/png") == 1 and "white" in text and "not asked for" not in text
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        (
            "1 / 0",
            1,
            r"01_explore failed in cell \[3\] '1 / 0': ZeroDivisionError: division by zero",
        ),
        (
            "import os; os._exit(1)",
            1,
            r"01_explore failed in cell \[3\] 'import os; .*': DeadKernel",
        ),
        (
            "InputError = type('InputError', (ValueError,), {}); raise InputError('one\\ntwo')",
            2,
            "fedutils: one two$",
        ),
    ],
)
def test_a_failing_cell_is_named(project, capfd, line, status, message):
    break_cell(project, line, "01_explore")
    assert command() == status
    error = capfd.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    left = sorted(path.name for path in (project / "work/notebooks/A").iterdir())
    assert left == ["01_explore.html", "01_explore.ipynb"]


def test_the_ipynb_runs_where_the_py_or_jupytext_is_missing(project, monkeypatch):
    for path in (project / "notebooks").glob("*.py"):
        jupytext.write(jupytext.read(path), path.with_suffix(".ipynb"))
    monkeypatch.setitem(sys.modules, "jupytext", None)  # makes the import fail
    assert command("--only", "01") == 0
    monkeypatch.delitem(sys.modules, "jupytext")
    (project / "notebooks/01_explore.py").unlink()
    run({"work_dir": str(project / "w"), "name": "B"}, "01")
    assert (project / "w/notebooks/B/01_explore.html").is_file()


def test_the_kernel_dies_with_a_killed_pipeline(project):
    pid = sleep_in_first_cell(project)
    program = (
        "from pathlib import Path; from fedutils.batch import notebook, run;"
        f"notebook.FOLDER = Path({str(project / 'notebooks')!r}); run.run({{'work_dir': 'work'}})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    wait_for(lambda: pid.exists() and pid.read_text(), 60)
    process.kill()
    process.wait()
    wait_for(lambda: is_dead(pid.read_text()), 30)  # it would sleep 60 s


def test_an_interrupt_ends_the_kernel_too(project, capsys, interruptible):
    pid = sleep_in_first_cell(project)

    def interrupt():
        wait_for(lambda: pid.exists() and pid.read_text(), 60)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    assert command() == 130
    assert capsys.readouterr().err.startswith("fedutils: interrupted")
    wait_for(lambda: is_dead(pid.read_text()), 30)  # it would sleep 60 s


def sleep_in_first_cell(project):
    """Let the first notebook write its kernel's pid to the file that is returned, and wait."""
    pid = project / "pid"
    line = f"import os, time; Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)\n"
    edit(project / "notebooks/01_explore.py", "work = Path", f"{line}work = Path")
    return pid


def is_dead(pid):
    status = Path("/proc", pid, "status")
    return not status.exists() or "State:\tZ" in status.read_text()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
