"""What notebook 02 prepared, against what is asked of a later notebook."""

from typing import Any

import pandas as pd

from ..base.errors import InputError
from ..base.parameters import Parameters
from .split import check_splits

PREPARED_WITH = ("data_dir", "seed", "max_films", "image_size", "twins")


def prepared_with(settings: Parameters) -> dict[str, Any]:
    """Return the parameters that decide what is prepared; of the data folder its name."""
    asked = settings.identity()
    return {name: asked[name] for name in PREPARED_WITH}


def check_prepared(settings: Parameters, report: dict[str, Any], index: pd.DataFrame) -> None:
    """Raise InputError where films were prepared with other parameters, or a split has none.

    `report` and `index` are those of notebook 02; a run would else state what it did not use.
    """
    for name, asked in prepared_with(settings).items():
        if (used := report.get(name, asked)) != asked:
            raise InputError(
                f"{name}={asked!r}: {settings.prepared} was prepared with {used!r}; give notebooks"
                f" 02 and 03 the same profile and {name}, or another work_dir"
            )
    check_splits(index, settings.seed)
