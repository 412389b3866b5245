"""Several data folders as one: each is a source, and no patient or film is in two."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..base.errors import InputError, each
from ..base.findings import choose_findings, findings_of, spelled_twice
from .find import check_films, real_places
from .phantom.write import write_phantom
from .read import DataSet, read_folder


def split_folders(data_dir: str) -> list[Path]:
    """Return the folders of a parameter such as "A;B"; none for the phantom.

    A folder that is there with a semicolon in its own path is one.
    """
    names = data_dir.split(";")
    ways = [Path(";".join(names[:k]).strip()).expanduser() for k in range(1, len(names) + 1)]
    count = next((k for k in range(len(names), 1, -1) if ways[k - 1].is_dir()), 1)
    first = [ways[count - 1]] if count > 1 or names[0].strip() else []
    return first + split_folders(";".join(names[count:])) if data_dir else []


def open_data(data_dir: str, work_dir: str | Path, findings: str = "") -> DataSet:
    """Read a run's data sets; without a folder the phantom, written below `work_dir` if need be.

    `findings` is the parameter: which of those that the data know are kept.
    """
    folders = split_folders(data_dir)
    if folders:
        data = join_sources(each(lambda folder: read_folder(folder, Path(work_dir)), folders))
    else:
        data = read_folder(write_phantom(Path(work_dir) / "phantom"))
    known = findings_of(data.table)
    left_out = [name for name in known if name not in choose_findings(known, findings)]
    boxes = data.boxes[~data.boxes["finding"].isin(left_out)].reset_index(drop=True)
    return dataclasses.replace(data, table=data.table.drop(columns=left_out), boxes=boxes)


def join_sources(parts: list[DataSet]) -> DataSet:
    """Put several data sets below each other; a single one is returned as it is.

    Films and patients are named SOURCE/NAME, after their folder, which `source` holds; paths become
    absolute. What a source did not look for is NaN. Raises InputError for a source without films,
    a film of two sources, and a finding that two of them spell differently.
    """
    if len(parts) == 1:
        return parts[0]
    named: dict[str, DataSet] = {}
    for part in parts:
        check_films(part.table, part.folder, None)
        stem = re.sub(r"[^\w.-]+", "-", part.folder.name)
        count = sum(name.partition("~")[0] == stem for name in named)
        named[f"{stem}~{count + 1}" if count else stem] = part
    place = {name: part for part in parts for name in findings_of(part.table)}
    if pair := spelled_twice(place):
        found = " and ".join(f"{name!r} of {place[name].folder}" for name in pair)
        todo = place[pair[1]].mapping.to_rename(pair[1], pair[0])
        raise InputError(f"{found} are one finding; for the second {todo}")
    table = pd.concat([_of_source(one.table, n, one.folder) for n, one in named.items()])
    there = table[table["path"] != ""]
    again = there[pd.Index(real_places(there["path"], follow=True)).duplicated(keep=False)]
    if len(again):
        found = " and ".join(again["source"].unique())
        what = f"the film {again['path'].iloc[0]} is in both {found}, maybe by a link"
        raise InputError(f"{what}; give each folder once")
    names = [name for name in table.columns if name not in findings_of(table)]
    return dataclasses.replace(
        parts[0],
        table=table[names + findings_of(table)].sort_values("image_index", ignore_index=True),
        boxes=pd.concat([_of_source(one.boxes, n) for n, one in named.items()], ignore_index=True),
        release=" + ".join(dict.fromkeys(map(_release_of, parts))),
        table_file=" + ".join(one.table_file for one in parts),
        lists=tuple(dict.fromkeys(name for one in parts for name in one.lists)),
        found=_join_found(named),
        parts=named,
    )


def _release_of(part: DataSet) -> str:
    """Name a data set's release beside others, where "2020" alone does not say that it is NIH's."""
    year = part.mapping.name == "nih" and part.release != "phantom"
    return f"nih {part.release}" if year else part.release


def _of_source(table: pd.DataFrame, source: str, folder: Path | None = None) -> pd.DataFrame:
    """Name films, and patients and paths if there are any, by their source."""
    table = table.assign(image_index=f"{source}/" + table["image_index"].astype(str))
    if folder is None:
        return table
    paths = [f"{folder.resolve()}/{path}" if path else "" for path in table["path"]]
    return table.assign(
        source=source, patient_id=f"{source}/" + table["patient_id"].astype(str), path=paths
    )


def _join_found(named: Mapping[str, DataSet]) -> dict[str, list[str]]:
    """Put together what only the raw files show."""
    checks = dict.fromkeys(check for one in named.values() for check in one.found)
    return {
        check: [f"{n}/{item}" for n, one in named.items() for item in one.found.get(check, ())]
        for check in checks
    }


def compare_sources(table: pd.DataFrame) -> pd.DataFrame:
    """Describe the sources, a row each: films, patients, age, view, then the findings' shares.

    `age` is the median in years, `view` says how many of the known are PA; a share is of the films
    whose label is known, NaN where a source did not look for the finding.
    """
    groups = table.groupby("source")
    report = pd.DataFrame({
        "films": groups.size(), "patients": groups["patient_id"].nunique(),
        "age": groups["age"].median(),
        "view": groups["view"].agg(_views),
    })  # fmt: skip
    return report.join(groups[findings_of(table)].mean().astype(float))


def _views(views: pd.Series) -> str:
    """Say how many of the known views are PA."""
    known = views[views != ""]
    return f"{(known == 'PA').mean():.0%} PA" if len(known) else "unknown"
