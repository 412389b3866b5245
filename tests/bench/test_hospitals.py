"""Drawn films in the layout of downloads: their labels are what was drawn, and hospitals train."""

import downloads
import numpy as np
import pandas as pd
import pytest
from downloads import DOWNLOADS, draw, write_download
from hospitals import hospitals

from fedutils.base.findings import findings_of
from fedutils.films.check import check_table
from fedutils.films.decode import decode_film
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.read import read_folder
from fedutils.films.sources import compare_sources, join_sources

RELEASES = ["2020", "chexpert", "vinbigdata", "rsna", "padchest"]
WORDS = {"Effusion": "Pleural effusion", "Pleural_Thickening": "Pleural thickening",
         "Fibrosis": "Pulmonary fibrosis"}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """All five, of 30 patients each."""
    root = tmp_path_factory.mktemp("downloads")
    return {name: write_download(name, root, 30) for name in DOWNLOADS}


def means(name, finding):
    """The drawn findings that a set's label stands for."""
    if name == "CheXpert-v1.0-small":
        return downloads.CHEXPERT["Pleural Effusion" if finding == "Effusion" else finding]
    if name == "VinBigData":
        return downloads.VINBIGDATA[WORDS.get(finding, finding)]
    return (finding,)


@pytest.mark.parametrize(("name", "release"), [*zip(DOWNLOADS, RELEASES, strict=True)])
def test_a_download_is_recognised_and_says_what_was_drawn(folders, name, release):
    data = read_folder(folders[name])
    drawn = draw(30, DOWNLOADS[name][2], one_each=name in ("VinBigData", "RSNA"))
    assert data.release == release and data.films_present == len(data.table) == len(drawn)
    order = data.table.set_index("image_index")
    if name == "CheXpert-v1.0-small":
        order = order.set_axis(order.index.str.extract(r"(.*patient\d+/study\d+)")[0])
        keys = [
            f"{'valid' if d.row.split == 'test' else 'train'}/patient{d.film.patient:05d}"
            f"/study{d.film.follow_up + 1}" for d in drawn
        ]  # fmt: skip
        order = order.loc[keys]
    elif name == "PadChest":
        order = order.loc[[f"{DOWNLOADS[name][2]}_{d.film.name}" for d in drawn]]
    for finding in findings_of(data.table):
        truth = np.array([d.says(means(name, finding)) for d in drawn], dtype=float)
        known = order[finding].notna().to_numpy()
        assert known.any()
        assert (order[finding].to_numpy()[known] == truth[known]).all(), finding
    assert name == "CheXpert-v1.0-small" or data.table[findings_of(data.table)].notna().all(
        axis=None
    )
    checks = check_table(data).set_index("check")["count"]
    assert checks["orphaned films"] == 0  # a lateral film has a row, which is not kept
    assert (checks["rows left out"] > 0) == (name == "CheXpert-v1.0-small")


def test_a_film_is_the_same_in_each_kind_of_file(folders):
    for name, folder in folders.items():
        data, drawn = read_folder(folder), draw(30, DOWNLOADS[name][2])
        one = next(d for d in drawn if d.film.patient == 7 and d.film.follow_up == 0)
        rows = data.table
        if name in ("VinBigData", "RSNA"):
            first = [d.film.patient for d in drawn if d.film.follow_up == 0].index(7)
            row = rows.iloc[first]
        else:
            row = rows[rows["path"].str.contains("patient00007/study1/|00000007_000.png")].iloc[0]
        pixels, _ = decode_film(folder / row["path"], 64)
        assert np.abs(pixels.astype(int) - one.pixels).mean() < 2, name  # JPEG's loss


def test_sources_side_by_side_claim_no_view_that_nobody_knows(folders):
    report = compare_sources(
        join_sources([read_folder(folder) for folder in folders.values()]).table
    )
    assert report.loc["VinBigData", "view"] == "unknown"
    for name in ("NIH", "RSNA"):  # RSNA's stands in the films' headers alone
        assert report.loc[name, "view"].endswith("% PA") and report.loc[name, "view"] != "0% PA"
    assert set(FINDINGS) < set(report.columns)


def test_hospitals_as_downloaded_run_through_the_four_notebooks(tmp_path):
    """The small form of `make hospitals`."""
    text = hospitals(tmp_path, ["CheXpert-v1.0-small", "RSNA"], "1", "32", patients=40, alone=())
    rows = {line.split(" | ")[0].strip("| "): line.split("|") for line in text.splitlines()}
    assert rows["Pneumonia"][2].strip() == "CheXpert-v1.0-small, RSNA"
    assert rows["Edema"][2].strip() == "CheXpert-v1.0-small"
    assert [c.strip() for c in rows["Fracture"][3:7]] == [""] * 4  # no film shows it
    metrics = pd.read_csv(tmp_path / "runs/five/evaluation/metrics.csv", dtype={"seed": str})
    own = metrics[(metrics["client"] == "RSNA") & (metrics["test_set"] == "all")]
    untaught = ~own["finding"].isin(["Pneumonia"])
    assert own.loc[untaught, "value"].isna().all()  # never 0.5
    assert own.loc[~untaught, "value"].notna().all()
