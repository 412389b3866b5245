"""The command line: what it says without running anything."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from tiny import tiny_films, tiny_settings

import fedutils
from fedutils.__main__ import main
from fedutils.settings import FIELDS, ROOMS
from fedutils.training.training import Training

SLOW = ("torch", "torchvision", "pandas", "numpy", "matplotlib", "papermill", "nbformat")


def test_the_version_is_said_before_anything_slow_is_imported():
    program = (
        "import sys, fedutils, fedutils.__main__ as command\n"
        "try: command.main(['--version'])\n"
        f"finally: print([name for name in {SLOW} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"fedutils {fedutils.__version__}\n[]\n"


def test_all_parameters_are_listed_each_under_the_room_that_declares_it(capsys):
    assert main(["parameters"]) == 0
    listed = {}
    for line in capsys.readouterr().out.splitlines():
        if heading := re.match(r"(fedutils\.[\w.]+): (\w.*)", line):
            names = listed[heading[1], heading[2]] = {}
        elif line:
            name, meaning = re.fullmatch(r"  (\w+) +(\w.*)", line).groups()
            names[name] = meaning
    assert [room for room, _ in listed] == [room.__module__ for room in ROOMS]
    for room, names in zip(ROOMS, listed.values(), strict=True):
        assert list(names) == [field.name for field in dataclasses.fields(room)]
        assert all(FIELDS[name].metadata["meaning"] in meaning for name, meaning in names.items())
    all_names = [name for names in listed.values() for name in names]
    assert sorted(all_names) == sorted(FIELDS)


def test_an_option_says_of_its_parameter_what_the_list_of_parameters_says():
    from fedutils.__main__ import OPTIONS
    from fedutils.settings import FIELDS

    assert {name: FIELDS[name].metadata["meaning"] for name in OPTIONS} == OPTIONS


def said(capsys, *words, status=2):
    """What a command says when it is refused, in a line."""
    try:
        assert main(list(words)) == status
    except SystemExit as refused:
        assert refused.code == status
    return capsys.readouterr().err


@pytest.mark.parametrize(("words", "expected"), [
    ("run -p round=2", "unknown parameter 'round'; did you mean rounds?"),
    ("run --rounds 2", "no option --rounds: give it as -p rounds=2"),
    ("run --rounds=2", "no option --rounds=2: give it as -p rounds=2"),
    ("run --num-clients 3", "no option --num-clients: give it as -p num_clients=3"),
    ("run --what", "no option --what: --help lists what there is"),
    ("run -p rounds=0", "rounds=0: give a number above 0; left out it is 4 in the demo"),
    ("run -p rounds=0.5", "expected int"),
    ("sweep lr=0.1,0.2", "several values: sweep 'lr=0.1|0.2'"),
    ("verify nowhere", "expected a run: a name that `fedutils list` has, or its folder"),
    ("show nowhere", "no run; `fedutils list` names those that there are"),
])  # fmt: skip
def test_a_mistake_is_answered_by_what_to_type(capsys, words, expected):
    assert expected in said(capsys, *words.split())


def test_each_command_has_help_with_an_example(capsys):
    for command in (
        "run",
        "list",
        "show",
        "sweep",
        "verify",
        "test",
        "predict",
        "flower",
        "kaggle",
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"For example: fedutils {command}" in capsys.readouterr().out


def test_a_shell_completes_parameters_and_runs(tmp_path):
    """By the library's own protocol, as bash asks."""
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/config.json").write_text("{}")
    for line, expected in (
        ("fedutils run -p num_c", "num_clients="),
        (f"fedutils show --work {tmp_path} f", "first"),
        ("fedutils ver", "verify"),
    ):
        asked = os.environ | {
            "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)),
            "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said"), "COMP_TYPE": "9",
        }  # fmt: skip
        subprocess.run([sys.executable, "-m", "fedutils"], env=asked, check=False)
        assert expected in (tmp_path / "said").read_text(), line


def test_runs_are_listed_and_shown(tmp_path, capsys):
    """One is trained, one begun; what a plan would do is said before anything runs."""
    films = tiny_films(tmp_path)
    Training(tiny_settings(tmp_path, rounds=1, name="done"), films).train()
    config = tmp_path / "runs/begun/config.json"
    config.parent.mkdir()
    config.write_text((tmp_path / "runs/done/config.json").read_text())
    assert main(["list", "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:4] == ["run", "date", "data", "partition"]
    states = {line.split()[0]: line for line in lines[1:]}
    assert "trained" in states["done"] and "unfinished" in states["begun"]
    assert main(["show", "done", "--work", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("done: trained, 1 round\n") and "  tracked=layer1,fc\n" in told
    plan = ["run", "--dry-run", "--work", str(tmp_path), "--profile", "demo"]
    assert main(plan) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("runs: it has not run; how long: " in line for line in lines[1:])
    assert not (tmp_path / "notebooks").exists()
