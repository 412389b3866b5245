"""Tables of models, findings and test sets: names, rows, and their text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.files import read_written
from ..base.findings import findings_of
from ..base.parameters import Parameters
from ..base.scores import undefined
from ..dataset import read_report
from ..rounds import UNMEASURED
from ..run import ADOPTED, Model, read_history

ROUND = ["arm", "seed", "round"]
COUNTED = "ok", UNMEASURED  # the status of an update that is in the mean
OWNER = ["arm", "seed", "client"]  # names a model; `client` is its owner in the arm `local`
Owner = tuple[str, str, str]  # arm, seed, client
Draws = dict[str, np.ndarray]  # by test set: (metrics, findings + 1, 1 + repeats)
MEAN, MEAN_LOCAL = "mean", "mean local model"
ALL_FILMS, ONE_FILM = "all", "one film a patient"  # test sets beside the clients and the subgroups
OUTSIDE = "outside="  # then a client: the test films of all others
SHOWN, NOT_SHOWN = "shown", "no difference shown"
FEW, ONE_SEED = "too few patients", "one training seed: not judged"
LEAST_PATIENTS = 10  # with the finding, and without, for it to be judged and to count in the mean
LEAST_POSITIVES = 30  # films of a subgroup, for anything to be concluded from it
METRICS = ("auroc", "average_precision")
TEXT_COLUMNS = "test_set", "hospital", "first", "second", "finding", "verdict"  # columns of text
RATES = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
SUMMARY = "evaluation/summary.json"  # below the run folder
POOLED = "evaluation/pooled.json"  # of a run whose films never left their hospitals
NETWORK = "network"  # the partition of such a run
BRACKETS = {"form": " [{}, {}]", "without": ""}  # an interval in a figure, where room is scarce


class Evaluation(NamedTuple):
    """The tables of notebook 04, and the findings that the primary mean is taken over."""

    metrics: pd.DataFrame
    differences: pd.DataFrame
    mean_over: list[str]


def is_client(test_set: str) -> bool:
    """Tell whether a test set is that of a client, neither all films nor a subgroup."""
    return test_set not in (ALL_FILMS, ONE_FILM) and "=" not in test_set


def is_subgroup(test_set: str) -> bool:
    """Tell whether a test set is all films, a subgroup, or one film a patient: no hospital's."""
    return not is_client(test_set) and not test_set.startswith(OUTSIDE)


def check_once(predictions: pd.DataFrame, where: object = "predictions") -> pd.DataFrame:
    """Return predictions; InputError where a model has a film twice: all values would be false."""
    if predictions.fillna({"client": ""}).duplicated([*OWNER, "image_index"]).any():
        raise InputError(f"{where}: a model has a film twice: predict again with notebook 04")
    return predictions


def truth_of(index: pd.DataFrame) -> np.ndarray:
    """Return the labels of an index, or the scores of predictions, as float (n, findings)."""
    return index[findings_of(index)].to_numpy(dtype=float)


def name_rows(rows: pd.DataFrame, names: Mapping[str, object]) -> pd.DataFrame:
    """Put constant columns before a table, in the order given."""
    return rows.assign(**names)[[*names, *rows.columns]]


def name_model(rows: pd.DataFrame, owner: Sequence[object]) -> pd.DataFrame:
    """Put the arm, seed and client of a model before a table."""
    return name_rows(rows, dict(zip(OWNER, owner, strict=True)))


def rows_of(table: pd.DataFrame, **wanted: str) -> pd.DataFrame:
    """Keep the rows that hold what is wanted in these columns, such as `metric="auroc"`."""
    return table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]


def mean_auroc_rows(table: pd.DataFrame, **wanted: str) -> pd.DataFrame:
    """Keep the rows of the mean AUROC that hold what else is wanted."""
    return rows_of(table, finding=MEAN, metric="auroc", **wanted)


def over_seeds(metrics: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the means over seeds on all test films."""
    return rows_of(metrics, seed="", test_set=ALL_FILMS)


def hospitals(metrics: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Keep an arm's mean AUROC on the test films of each client, over seeds (and local models)."""
    rows = mean_auroc_rows(metrics, arm=arm, seed="", client="")
    return rows.loc[rows["test_set"].map(is_client)]


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of the evaluation; an empty name stays empty text, and a seed is text too."""
    table = read_written(path, *OWNER, *TEXT_COLUMNS)
    if "seed" in table:  # beside an empty seed pandas writes 0 as 0.0
        table["seed"] = table["seed"].str.removesuffix(".0")
    return table


def read_summary(settings: Parameters) -> dict[str, Any]:
    """Read the `summary.json` of a run; raise InputError where notebook 04 has not run."""
    path = settings.run / SUMMARY
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 04_evaluate on {settings.name} first")
    return json.loads(path.read_text())


def read_data(settings: Parameters) -> dict[str, Any]:
    """Read what is known of a run's films: notebook 02's report, or what their hospitals counted.

    Raises InputError where hospitals have not tested the run yet.
    """
    if settings.partition != NETWORK:
        return read_report(settings.prepared)
    path = settings.run / POOLED
    if not path.is_file():
        again = "`fedutils flower train` with its parameters tests it"
        raise InputError(
            f"{path} is not there: the hospitals have not tested {settings.name}: {again}"
        )
    return json.loads(path.read_text())


def adopted_models(run: Path) -> dict[str, str]:
    """Return which models were not trained in this run from the start, and whose they were."""
    rows = read_history(run)
    rows = rows[(rows["client"] == "") | (rows["arm"] == "local")]
    rows = rows[rows["reason"].str.startswith(ADOPTED)]
    names = [Model(row.arm, row.seed, row.client).name for row in rows.itertuples()]
    return dict(zip(names, rows["reason"].str.removeprefix(ADOPTED), strict=True))


def tabulate(metrics: pd.DataFrame) -> pd.DataFrame:
    """Lay the table out for reading: a row a finding, a column an arm and metric, with intervals.

    Shown are the test set `all` and the means over seeds; of the local models their mean.
    """
    rows = rows_of(metrics, seed="", client="", test_set=ALL_FILMS)
    columns = {}
    for metric, word in zip(METRICS, ("AUROC", "average precision"), strict=True):
        for arm, own in rows_of(rows, metric=metric).groupby("arm", sort=False):
            texts = [value_or_why_not(row) for row in own.itertuples()]
            name = f"{word}, {MEAN_LOCAL if arm == 'local' else arm}"
            columns[name] = pd.Series(texts, own["finding"])
    most = rows.loc[rows["finding"] == MEAN, "positives"].max()
    table = pd.DataFrame(columns)
    table = table.loc[[MEAN, *table.index.drop(MEAN)]]
    return table.rename({MEAN: f"mean of {most}"}).rename_axis(index=None)


def tabulate_homes(result: Evaluation) -> pd.DataFrame:
    """Lay out what each hospital gains by taking part: a row a hospital with a local model.

    At home are its own test films, outside those of all others, both over the findings, which are
    counted, that they and all others' homes have patients enough of. The gain is that at home,
    paired; empty without both arms.
    """
    rows = mean_auroc_rows(result.metrics, seed="").set_index(["arm", "client", "test_set"])
    gains = mean_auroc_rows(result.differences).set_index(["second", "test_set"])
    table = []
    for name in dict.fromkeys(client for arm, client, _ in rows.index if arm == "local" and client):
        cells = {"hospital": name, "findings": rows.loc[("local", name, name), "positives"]}
        for where, place in (("at home", name), ("outside", f"{OUTSIDE}{name}")):
            for word, model in (("local", ("local", name)), ("federated", ("federated", ""))):
                if (*model, place) in rows.index:
                    one = rows.loc[(*model, place)]
                    cells[f"{word}, {where}"] = value_or_why_not(one, without="")
        if (f"local {name}", name) in gains.index:
            gain = gains.loc[(f"local {name}", name)]
            cells["gain at home"] = value_or_why_not(gain, sign="+", without=" (no interval)")
            cells["verdict"] = gain["verdict"]
            table.append(cells)
    return pd.DataFrame(table)


def tabulate_differences_text(differences: pd.DataFrame) -> pd.DataFrame:
    """Lay the differences of the mean AUROC out for reading, a row a pair and test set."""
    rows = mean_auroc_rows(differences)
    table = {
        "films": rows["test_set"],
        "difference of mean AUROC": rows["first"] + " − " + rows["second"],
        "value (95 % interval)": [
            value_or_why_not(row, sign="+", without=" (no interval)") for row in rows.itertuples()
        ],
        "seeds": rows["seeds"],
        "by pair of seeds": [span(row.seed_low, row.seed_high) for row in rows.itertuples()],
        "3 seeds can show": [
            "" if np.isnan(size) else f"{size:.3f}" for size in rows["detectable_3"]
        ],
        "verdict": rows["verdict"],
    }
    return pd.DataFrame(table)


def best_rounds(history: pd.DataFrame) -> pd.DataFrame:
    """Return the row of each model's best validation round, which is the one that is kept.

    The highest AUROC counts, then the lowest loss, then the earlier round; without validation films
    it is the last.
    """
    models = history[(history["client"] == "") | (history["arm"] == "local")]
    turn = models["round"].where(models["val_loss"].notna(), -models["round"])
    score = models.assign(score=models["val_auroc"].fillna(-np.inf), turn=turn)
    order = score.sort_values(["score", "val_loss", "turn"], ascending=[False, True, True])
    best = order.groupby(["arm", "seed", "client"]).head(1)
    return best.drop(columns=["score", "turn"]).sort_index()


def read_budget(run: Path) -> pd.DataFrame:
    """Read `privacy.csv` of a run: a row a model and hospital; empty without privacy."""
    path = run / "privacy.csv"
    if not path.is_file():
        return pd.DataFrame()
    return read_written(path, "client", "hospital")


def training_cost(history: pd.DataFrame, settings: Parameters, clients: int) -> pd.DataFrame:
    """Return what each arm had spent at each round, and the AUROC it then had on validation films.

    Columns: `arm, seed, round, films_seen, gigabytes, val_auroc`. Films count once each time they
    are trained on; gigabytes are the states sent, both ways. Of the arm `local` the films of all
    models are summed, and their AUROC averaged. `clients` is their number in the run.
    """
    models = (history["client"].fillna("") == "") | (history["arm"] == "local")
    rows = history[models].assign(sent=history["bytes_up"] + history["bytes_down"])
    table = rows.groupby(ROUND, sort=False).agg(
        films_seen=("examples", "sum"), gigabytes=("sent", "sum"), val_auroc=("val_auroc", "mean")
    )
    own = history[(~models | (history["arm"] != "federated")) & history["status"].isin(COUNTED)]
    own = own.set_index(ROUND)["examples"]
    own = own.fillna(table["films_seen"] / own.groupby(ROUND).size()).dropna()  # masked: mean
    films = (own * own.map(settings.passes)).groupby(ROUND).sum()
    if settings.local_steps:  # the centralised arm takes those of all
        films *= np.where(films.index.get_level_values("arm") == "centralised", clients, 1)
    table["films_seen"] = films
    spent = ["films_seen", "gigabytes"]
    table[spent] = table.groupby(["arm", "seed"])[spent].cumsum()
    return table.assign(gigabytes=table["gigabytes"] / 1e9).reset_index()


def value_or_why_not(row: Any, **look: str) -> str:
    """Write a value as `with_interval` does, or say why there is none."""
    if not np.isnan(row.value):
        return with_interval(row, **look)
    return "not defined" if row.finding == MEAN else undefined(row.positives, row.n)


def with_interval(
    row: Any,
    sign: str = "",
    form: str = " ({} to {})",
    without: str = " (no interval: too few patients)",
) -> str:
    """Write a value with its interval in this form, or with what stands there without one."""
    value, low, high = (f"{part:{sign}.3f}" for part in (row.value, row.ci_low, row.ci_high))
    return value + (without if np.isnan(row.ci_low) else form.format(low, high))


def span(low: float, high: float, sign: str = "+") -> str:
    """Write the smallest and the largest of several values, once if they look the same."""
    if np.isnan(low):
        return "not defined"
    return " to ".join(dict.fromkeys([f"{low:{sign}.3f}", f"{high:{sign}.3f}"]))


def main_model(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row `arm, seed, client`: the first federated model of a table, else the first."""
    federated = table[table["arm"] == "federated"]
    return (federated if len(federated) else table)[OWNER].head(1)


def tabulate_points(points: pd.DataFrame) -> pd.DataFrame:
    """Lay one model's operating points out for reading: a row a finding, rates by rule."""
    points = points.set_index("finding")
    whole = points[~points.index.duplicated()]
    prevalence = whole["prevalence"].map("{:.3f}".format)
    positive = whole["positives"].map("{:,}".format)
    parts = {"test films": pd.DataFrame({"positive": positive, "prevalence": prevalence})}
    for rule, rows in points.groupby("rule", sort=False):
        text = pd.DataFrame({name: texts_of(rows, name) for name in RATES}, rows.index)
        text.loc[rows["threshold"].isna(), "sensitivity"] = "no cut"  # then nothing is defined
        parts[rule] = text.rename(columns=RATES)
    return pd.concat(parts, axis=1).rename_axis(index=None)


def texts_of(table: pd.DataFrame, name: str, digits: int = 2) -> list[str]:
    """Write a column with its `_low` and `_high`, such as '0.83 (0.71 to 0.90)'."""
    ends, form = table[[name, f"{name}_low", f"{name}_high"]].to_numpy(float), f".{digits}f"
    interval = [f" ({low:{form}} to {high:{form}})" * (not np.isnan(low)) for _, low, high in ends]
    shown = [_number(value, form) for value, _, _ in ends]
    return [value + span for value, span in zip(shown, interval, strict=True)]


def _number(value: float, form: str = ".2f") -> str:
    """Write a number, or a dash where there is none."""
    return "–" if np.isnan(value) else f"{value:{form}}"


def tabulate_calibration(calibration: pd.DataFrame) -> pd.DataFrame:
    """Lay one model's calibration out for reading: a row a hospital and finding, with intervals."""
    columns = {"brier": "Brier", "ece": "ECE", "slope": "slope", "intercept": "intercept"}
    table = calibration[["hospital", "finding", "n", "positives"]].reset_index(drop=True)
    table["hospital"] = table["hospital"].replace("", "all films")
    for name, word in columns.items():
        table[word] = texts_of(calibration, name)
    table.insert(6, "ECE if right", [_number(value) for value in calibration["ece_chance"]])
    return table


def tally_words(row: Any) -> str:
    """Write a tally such as '31 of 180 (0.17, 95 % interval 0.12 to 0.23)'."""
    ends = f"95 % interval {row.ci_low:.2f} to {row.ci_high:.2f}"
    interval = "too few patients for an interval" if np.isnan(row.ci_low) else ends
    return f"{row.hits:.0f} of {row.n:.0f} ({row.value:.2f}, {interval})"
