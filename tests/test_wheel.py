"""The wheel holds every room, and each can be imported from it alone."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedutils.base.files import package_files

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "requirements.txt", "fedutils")
FILES = [path.relative_to(ROOT) for path in package_files()]
ROOMS = [file for file in FILES if file.suffix == ".py"]
WINGS = sorted({room.parts[1] for room in ROOMS if len(room.parts) > 2})
# In a Python that sees neither this folder nor variables: where each module comes from.
IMPORT = """
import importlib, json, sys
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


def build(sources, out):
    """Build a wheel; where setuptools is missing, pip has to fetch it, and may not be able to."""
    here = ["--no-build-isolation", "--no-index"] if find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *here, "-w", out, sources]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode and not here:
        pytest.skip(f"no setuptools here, and none to be had: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A folder that holds the unpacked wheel and nothing else; it was built from a copy."""
    work = tmp_path_factory.mktemp("wheel")
    (work / "sources").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, work / "sources" / name)
    with zipfile.ZipFile(build(work / "sources", work / "out")) as wheel:
        wheel.extractall(work / "unpacked")
    return work / "unpacked"


def test_the_wheel_holds_every_room_and_no_more(unpacked):
    files = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    package = {path for path in files if not path.parts[0].endswith(".dist-info")}
    assert package == set(FILES) > set(ROOMS) and len(WINGS) == 8
    held = {file: (unpacked / file).read_bytes() for file in FILES}
    assert held == {file: (ROOT / file).read_bytes() for file in FILES}


@pytest.mark.parametrize("wing", ["", *WINGS])
def test_every_room_is_imported_from_the_wheel_alone(unpacked, tmp_path, wing):
    if wing == "network" and not find_spec("flwr"):
        pytest.skip("fedutils.network needs Flower: pip install -e '.[flower]'")
    rooms = [room for room in ROOMS if (room.parts[1] if len(room.parts) > 2 else "") == wing]
    names = [".".join(room.with_suffix("").parts).removesuffix(".__init__") for room in rooms]
    command = [sys.executable, "-I", "-c", IMPORT, str(unpacked), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(zip(names, (str(unpacked / room) for room in rooms), strict=True))
    assert json.loads(done.stdout) == found and names
