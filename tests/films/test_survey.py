"""What a hospital tells before training: true counts, and nothing of a few patients."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_films

from fedutils.batch.survey import draw_surveys
from fedutils.films.survey import (
    HIDDEN,
    count_groups,
    describe_films,
    differing,
    shares,
    tabulate_surveys,
)


@pytest.fixture
def home(tmp_path):
    """Prepared films of 60 patients, of which 3 have a known sex M, and Hernia is rare."""
    films = tiny_films(tmp_path)
    index = films.index.drop(columns="client")
    index["sex"] = ["M"] * 3 + ["F"] * 57
    index["age"] = [30] * 20 + [44] * 37 + [91] * 3
    index["view"] = ["AP"] * 30 + [""] * 30
    index["Hernia"] = [1] * 4 + [0] * 56
    index["Mass"] = [1] * 30 + [0] * 6 + [np.nan] * 24
    index.to_csv(tmp_path / "prepared/index.csv", index=False)
    report = json.loads((tmp_path / "prepared/report.json").read_text())
    about = {"release": "tiny", "image_size": 32, "seed": 0}
    (tmp_path / "prepared/report.json").write_text(json.dumps(report | about))
    return tmp_path / "prepared", films


def test_counts_are_those_of_the_index_and_small_ones_are_hidden(home):
    found, mean = describe_films(home[0], least=5)
    assert found["split"] == {"train": 36, "val": 12, "test": 12} == found["split patients"]
    assert found["view"] == {"AP": 30, "unknown": 30}
    # Three men: the women's count goes, too, since the total would give the men away.
    assert found["sex"] == {"F": HIDDEN, "M": HIDDEN}
    assert found["age"]["30-39"] == HIDDEN and found["age"]["40-49"] == 37
    assert found["age"]["90-99"] == HIDDEN == found["age"]["0-9"]
    assert (found["known"]["Hernia"], found["positive"]["Hernia"]) == (60, HIDDEN)
    assert (found["known"]["Mass"], found["positive"]["Mass"]) == (36, 30)
    exact = home[1].store.mean(axis=0)
    assert np.abs(mean - exact).max() <= 0.5


def test_of_too_few_patients_nothing_is_told(home):
    found, mean = describe_films(home[0], least=61)
    counts = pd.json_normalize({k: found[k] for k in ("split", "age", "known", "positive")})
    assert (counts == HIDDEN).all(axis=None) and mean is None


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 8))
def test_no_total_gives_away_a_group_of_a_few(sizes, least):
    """Whoever knows the total knows what all hidden groups hold together: nobody, or enough."""
    group = pd.Series(np.repeat([f"g{k}" for k in range(len(sizes))], sizes), dtype=str)
    index = pd.DataFrame({"patient_id": np.arange(len(group))})
    found = count_groups(index, group, least, [f"g{k}" for k in range(len(sizes))])
    hidden = [size for size, count in zip(sizes, found.values(), strict=True) if count == HIDDEN]
    assert all(count == HIDDEN or count >= least for count in found.values())
    assert sum(hidden) == 0 or sum(hidden) >= least or len(hidden) == len(sizes)


def test_a_patient_with_many_films_is_one_patient():
    index = pd.DataFrame({"patient_id": ["p"] * 30 + list("abcdefgh")})
    found = count_groups(index, pd.Series(["x"] * 30 + ["y"] * 8), least=5)
    assert found == {"x": HIDDEN, "y": HIDDEN}


def test_what_would_end_a_run_is_said_and_the_rest_laid_side_by_side(home, tmp_path):
    one, mean = describe_films(home[0], least=5)
    other = one | {"image_size": 64, "findings": one["findings"][:2]}
    other["known"] = {name: one["known"][name] for name in other["findings"]}
    surveys = {"north": one | {"least": 5, "mean film": mean.tolist()}, "south": other}
    surveys["south"] = surveys["south"] | {"least": 7}
    assert [line.partition(":")[0] for line in differing(surveys)] == [
        "image_size differs", "findings differs",
    ]  # fmt: skip
    table = tabulate_surveys(surveys, "under 5")
    assert table.loc["Hernia", "north"] == "under 5 of 60"
    assert table.loc["Mass", "south"] == "" and table.loc["pixels", "south"] == "64"
    assert shares(surveys).loc["north", "Mass"] == 30 / 36
    assert np.isnan(shares(surveys).loc["north", "Hernia"])
    (tmp_path / "survey.json").write_text(json.dumps(surveys))
    files = draw_surveys(tmp_path)
    assert [path.name for path in files] == ["hospitals.png", "mean_films.png", "survey.csv"]
    assert all(path.stat().st_size > 100 for path in files)
