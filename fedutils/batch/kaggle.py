"""The Kaggle kit: folders for `kaggle datasets create` and `kaggle kernels push`, ready to send.

Format: github.com/Kaggle/kaggle-cli, docs/datasets_metadata.md and docs/kernels_metadata.md. Names
and titles have 6 to 50 characters, and the name of a notebook is its title as a slug.
"""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from torchvision.models import ResNet34_Weights

from ..base import __version__
from ..base.device import name_devices
from ..base.errors import InputError
from ..base.files import PACKAGE, write_atomic
from ..base.text import templates
from ..base.weights import find_weights
from ..settings import convert_texts, read_parameters
from .notebook import FOLDER, NOTEBOOKS, TRAINS, declared, parameter_cells, read_notebook
from .run import READS

# Kernels 01 and 02 have no GPU, which would tell `auto` apart from the demo; a session ends after
# 12 hours, and what it wrote is kept only if it has ended by itself.
ON_KAGGLE = {"profile": "kaggle", "max_hours": 11.0}
PACKAGE_DATA, WEIGHTS_DATA = "fedutils", "ResNet-34 ImageNet weights"
ABOUT = {
    PACKAGE_DATA: f"The package fedutils {__version__}: federated learning on chest X-rays (MIT).",
    WEIGHTS_DATA: "resnet34-b627a593.pth as torchvision hands it out (BSD-3-Clause).",
}
KIT = templates(__file__)
KIT.filters["quote"] = lambda path: shlex.quote(str(path))


def write_kit(user: str, out: Path, values: Mapping[str, Any]) -> list[str]:
    """Write two data sets and four kernels below `out`; return the commands that send them.

    `values` are parameters, such as max_films=5000, and go into the notebooks that read them.
    Raises InputError for an impossible name or parameter, and for a folder with anything but a kit.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", user):
        raise InputError(f"--user {user}: expected your name as in kaggle.com/NAME")
    earlier = (out / slug(PACKAGE_DATA) / "dataset-metadata.json").is_file()
    if out.exists() and not (out.is_dir() and (earlier or not any(out.iterdir()))):
        raise InputError(f"--out {out}: holds other files; give a new or an empty folder")
    nodes = {stem: read_notebook(FOLDER, stem) for stem in NOTEBOOKS}
    values = ON_KAGGLE | check_values(values)
    for title, text in ABOUT.items():
        about = {"title": title, "id": f"{user}/{slug(title)}", "description": text}
        about["licenses"] = [{"name": "other"}]  # Kaggle's list has neither MIT nor BSD
        _write(out / slug(title) / "dataset-metadata.json", json.dumps(about, indent=2) + "\n")
    code, trunk = out / slug(PACKAGE_DATA) / "fedutils", out / slug(WEIGHTS_DATA)
    shutil.rmtree(code, ignore_errors=True)  # what is left from an older version
    shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__"))
    if not list(trunk.glob("resnet34-*.pth")) and (found := find_weights("imagenet")):
        shutil.copyfile(found, trunk / found.name)
    for stem, node in nodes.items():
        read = [name for name in values if name in READS[stem]]
        set_parameters(node, {name: values[name] for name in read})
        _write(out / stem / "kernel-metadata.json", describe_kernel(user, stem))
        _write(out / stem / f"{stem}.ipynb", nbformat.writes(node))
    return commands(user, out)


def _write(path: Path, text: str) -> None:
    """Write a file, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def check_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters for kernels, converted; InputError for what is only of this machine."""
    found = convert_texts(values)
    for name in [name for name in ("data_dir", "work_dir") if found.get(name)]:
        raise InputError(f"{name}: kernels find attached films, and write where Kaggle keeps it")
    if found.get("weights", "") not in ("", "none", "imagenet"):
        raise InputError(f"weights={found['weights']!r}: kernels take imagenet, attached, or none")
    name_devices(found.get("device", "auto"))
    read_parameters(ON_KAGGLE | found | {"device": "cpu"})  # not whether this machine has it
    return found


def slug(title: str) -> str:
    """Return the name that Kaggle gives to a title: lower case, dashes between the words."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def describe_kernel(user: str, stem: str) -> str:
    """Return `kernel-metadata.json`; sources of sources are not attached, so 04 names 02, too."""
    before = NOTEBOOKS[: NOTEBOOKS.index(stem)]
    sources = [*before[-1:], *(before[1:2] if len(before) > 2 else [])]
    return KIT.get_template("kernel.json.j2").render(
        id=kernel_name(user, stem),
        stem=stem,
        gpu=stem in NOTEBOOKS[2:],
        data=["nih-chest-xrays/data", *(f"{user}/{slug(title)}" for title in ABOUT)],
        sources=[kernel_name(user, source) for source in sources],
    )


def kernel_name(user: str, stem: str) -> str:
    """Return what Kaggle calls the notebook: nobody's other one is likely to have its title."""
    return f"{user}/{slug(f'fedutils {stem}')}"


def set_parameters(node: NotebookNode, values: Mapping[str, Any]) -> None:
    """Write values into the parameters cell: in place of its defaults, or below what it shows."""
    shown = declared(node)
    for cell in parameter_cells(node):
        for name, value in values.items():
            text = json.dumps(value) if isinstance(value, str) else repr(value)
            if name not in shown:
                cell.source += f"\n{name} = {text}"
            line = rf"(?m)^({name}: \w+ = ).*?(?=  #|$)"
            cell.source = re.sub(line, lambda found, text=text: found[1] + text, cell.source)


def commands(user: str, out: Path) -> list[str]:
    """Return what to type, in order, with a comment where one has to wait."""
    code, trunk = (out / slug(title) for title in ABOUT)
    text = KIT.get_template("kaggle.sh.j2").render(
        code=code,
        trunk=trunk,
        has_weights=any(trunk.glob("resnet34-*.pth")),
        url=ResNet34_Weights.IMAGENET1K_V1.url,
        kernels={out / stem: kernel_name(user, stem) for stem in NOTEBOOKS},
        trains=out / TRAINS,
    )
    return text.splitlines()
