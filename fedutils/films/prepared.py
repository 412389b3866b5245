"""What notebook 02 prepared, against what is asked of a later notebook."""

from typing import Any

import pandas as pd

from ..base.errors import InputError
from ..base.files import sha256
from ..base.parameters import Parameters
from .find import list_tables
from .sources import split_folders
from .split import check_splits

PREPARED_WITH = (
    "data_dir", "tables", "seed", "max_films", "findings", "image_size", "twins", "suspects",
)  # fmt: skip


def prepared_with(settings: Parameters) -> dict[str, Any]:
    """Return what decides what is prepared: parameters; of the data folder name and tables."""
    tables = [path for one in split_folders(settings.data_dir) for path in list_tables(one)]
    content = "".join(path.name + sha256(path.read_bytes()) for path in tables)
    asked = settings.identity() | {"tables": sha256(content.encode())[:16] if tables else ""}
    return {name: asked[name] for name in PREPARED_WITH}


def check_prepared(settings: Parameters, report: dict[str, Any], index: pd.DataFrame) -> None:
    """Raise InputError where films were prepared with other parameters, or a split has none.

    `report` and `index` are those of notebook 02; a run would else state what it did not use.
    """
    for name, asked in prepared_with(settings).items():
        if (used := report.get(name, asked)) != asked:
            what = f"{name}={asked!r}" if name != "tables" else f"the tables of {settings.data_dir}"
            raise InputError(
                f"{what}: {settings.prepared} was prepared with {used!r}; give notebooks 02 and 03"
                f" the same profile and {name}, or another work_dir"
            )
    check_splits(index, settings.seed)
