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
from ..base.errors import InputError
from ..base.files import PACKAGE, write_atomic
from ..base.weights import find_weights
from ..settings import FIELDS
from .notebook import FOLDER, NOTEBOOKS, declared, read_notebook
from .run import READS, resolve

NIH = "nih-chest-xrays/data"
NEEDS_GPU = NOTEBOOKS[2:]
# Kernels 01 and 02 have no GPU, which would tell `auto` apart from the demo; a session ends after
# 12 hours, and what it wrote is kept only if it has ended by itself.
ON_KAGGLE = {"profile": "kaggle", "max_hours": 11.0}
PACKAGE_DATA, WEIGHTS_DATA = "fedutils", "ResNet-34 ImageNet weights"
ABOUT = {
    PACKAGE_DATA: f"The package fedutils {__version__}: federated learning on chest X-rays (MIT).",
    WEIGHTS_DATA: "resnet34-b627a593.pth as torchvision hands it out (BSD-3-Clause).",
}


def write_kit(
    user: str, out: Path, values: Mapping[str, Any], notebooks: Path = FOLDER
) -> list[str]:
    """Write two data sets and four kernels below `out`; return the commands that send them.

    `values` are parameters, such as max_films=5000, and go into the notebooks that read them.
    Raises InputError for a user's name or a parameter that cannot be, and for a folder that holds
    anything but an earlier kit.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", user):
        raise InputError(f"--user {user}: expected your name as in kaggle.com/NAME")
    earlier = (out / slug(PACKAGE_DATA) / "dataset-metadata.json").is_file()
    if out.exists() and not (out.is_dir() and (earlier or not any(out.iterdir()))):
        raise InputError(f"--out {out}: holds other files; give a new or an empty folder")
    nodes = {stem: read_notebook(notebooks, stem) for stem in NOTEBOOKS}
    values = ON_KAGGLE | dict(values)
    settings = resolve(values)[0]
    for title in ABOUT:
        _write_json(out / slug(title) / "dataset-metadata.json", describe_data(user, title))
    _copy_package(out / slug(PACKAGE_DATA) / "fedutils")
    weights = _copy_weights(out / slug(WEIGHTS_DATA))
    for stem, node in nodes.items():
        read = [name for name in values if name in READS.get(stem, FIELDS)]
        set_parameters(node, {name: getattr(settings, name) for name in read})
        _write_json(out / stem / "kernel-metadata.json", describe_kernel(user, stem))
        write_atomic(out / stem / f"{stem}.ipynb", nbformat.writes(node).encode())
    return commands(user, out, weights)


def slug(title: str) -> str:
    """Return the name that Kaggle gives to a title: lower case, dashes between the words."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def describe_data(user: str, title: str) -> dict[str, Any]:
    """Return `dataset-metadata.json` of a data set of ours."""
    licences = [{"name": "other"}]  # Kaggle's list has neither MIT nor BSD: the text names it
    about = {"title": title, "id": f"{user}/{slug(title)}", "description": ABOUT[title]}
    return about | {"licenses": licences}


def describe_kernel(user: str, stem: str) -> dict[str, Any]:
    """Return `kernel-metadata.json` of a notebook.

    Its sources are the kernel before, and for 04 also 02: sources of sources are not attached.
    """
    before = NOTEBOOKS[: NOTEBOOKS.index(stem)]
    sources = [*before[-1:], *(before[1:2] if len(before) > 2 else [])]
    gpu = stem in NEEDS_GPU
    return {
        "id": f"{user}/{slug(kernel_title(stem))}",
        "title": kernel_title(stem),
        "code_file": f"{stem}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": gpu,
        "enable_tpu": False,
        "enable_internet": False,
        **({"machine_shape": "NvidiaTeslaT4"} if gpu else {}),
        "dataset_sources": [NIH, *(f"{user}/{slug(title)}" for title in ABOUT)],
        "competition_sources": [],
        "kernel_sources": [f"{user}/{slug(kernel_title(source))}" for source in sources],
        "model_sources": [],
    }


def kernel_title(stem: str) -> str:
    """Return a title that no other notebook of the user is likely to have: fedutils 01 explore."""
    return f"fedutils {stem.replace('_', ' ')}"


def set_parameters(node: NotebookNode, values: Mapping[str, Any]) -> None:
    """Write values into the parameters cell: in place of its defaults, or below what it shows."""
    shown = declared(node)
    cells = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    for cell in cells:
        for name, value in values.items():
            text = json.dumps(value) if isinstance(value, str) else repr(value)
            if name not in shown:
                cell.source += f"\n{name} = {text}"
            line = rf"(?m)^({name}: \w+ = ).*?(?=  #|$)"
            cell.source = re.sub(line, lambda found, text=text: found[1] + text, cell.source)


def commands(user: str, out: Path, weights: Path | None) -> list[str]:
    """Return what to type, in order, with a comment where one has to wait."""
    data = [shlex.quote(str(out / slug(title))) for title in ABOUT]
    kernels = [shlex.quote(str(out / stem)) for stem in NOTEBOOKS]
    names = [f"{user}/{slug(kernel_title(stem))}" for stem in NOTEBOOKS]
    url = ResNet34_Weights.IMAGENET1K_V1.url
    download = f"curl -L -o {data[1]}/{Path(url).name} {url}"
    lines = ["# once: the code and the ImageNet weights, as data sets of yours"]
    lines += [] if weights else [download]
    lines += [f"kaggle datasets create -p {data[1]}"]
    lines += [f"kaggle datasets create -p {data[0]} --dir-mode zip"]
    lines += ["# each reads what the one before wrote: go on when its status is complete"]
    for kernel, name in zip(kernels, names, strict=True):
        lines += [f"kaggle kernels push -p {kernel}", f"kaggle kernels status {name}"]
    return [
        *lines,
        f"# if 03 says that it stopped at max_hours: add {names[2]} to its kernel_sources in",
        f"# {kernels[2]}/kernel-metadata.json, and push it again: it goes on from its checkpoint",
        "# after a change of the code:",
        f"kaggle datasets version -p {data[0]} --dir-mode zip -m 'new version'",
    ]


def _copy_package(target: Path) -> None:
    """Copy the package's code, and nothing that is left from an older version."""
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted(PACKAGE.rglob("*.py")):
        copy = target / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def _copy_weights(target: Path) -> Path | None:
    """Copy ImageNet's weights if they are on this machine; return where they lie, or None."""
    there = next(iter(sorted(target.glob("resnet34-*.pth"))), None)
    found = None if there else find_weights("imagenet")
    return shutil.copyfile(found, target / found.name) if found else there


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())
