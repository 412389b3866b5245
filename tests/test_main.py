"""The command line: what it says without running anything."""

import dataclasses
import re
import subprocess
import sys

import fedutils
from fedutils.__main__ import main
from fedutils.settings import FIELDS, ROOMS

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
