"""What notebook 04 writes: predictions, metrics, and the summary that says how to repeat them."""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from .device import find_devices
from .features import FeatureStore
from .federation import plan, predict_with
from .findings import FINDINGS, InputError
from .images import ChestXrayDataset, read_index, read_report, write_atomic
from .metrics import (
    ALL_FILMS,
    MEAN,
    METRICS,
    ONE_FILM,
    SHOWN,
    Resamples,
    bootstrap,
    evaluable_findings,
    patient_resamples,
    tabulate_differences,
    tabulate_draws,
    undefined,
    with_mean,
)
from .model import build_resnet34
from .privacy import read_budget
from .settings import Settings, environment, read_run
from .weights import state_hash

OWNER = ["arm", "seed", "client"]  # names a model; `client` is its owner in the arm `local`
REPEATS = 1000  # resamples of the test patients; under 560 no p survives Holm over 14 findings
AGES = {"0-39": (0, 40), "40-59": (40, 60), "60+": (60, np.inf)}  # years: from, below
MEAN_LOCAL = "mean local model"
FEDERATED = "federated", ""  # arm and client
DIFFERENCES = [
    "test_set", "first", "second", "finding", "metric", "value", "ci_low", "ci_high", "p", "p_holm",
    "seeds", "seeds_agree", "seed_low", "seed_high", "verdict",
]  # fmt: skip
Model = tuple[str, str, str]  # arm, seed, client
Draws = dict[str, np.ndarray]  # by test set: (metrics, 15, 1 + repeats)


def predict_films(settings: Settings, films: ChestXrayDataset, split: str) -> pd.DataFrame:
    """Predict the films of a split with every model of a run, at its best validation round.

    `films.index` carries `client` and `split`. Returns `arm, seed, client, image_index` and 14
    probabilities; `client` names the model's owner in the arm `local` and is empty elsewhere.
    With `cache_features` the trunk's output is taken from its store, if that is whole.
    """
    models = settings.run / "models"
    how = "none", settings.tracked, settings.batchnorm
    model = build_resnet34(*how, precision=settings.precision)
    model.place(find_devices(settings.device)[0]).load(load_file(models / "trunk.safetensors"))
    if settings.cache_features:
        fingerprint = read_report(settings.prepared)["fingerprint"]
        features = FeatureStore(model, films, settings, fingerprint).open()
        films = films if features is None else films.holding(features)
    jobs, films = plan(settings, films), films.where(films.index["split"] == split)
    tables = []
    for job in jobs:
        own = {c.name: models / f"{job.name}-{c.name}.safetensors" for c in job.clients}
        clients = {name: load_file(file) for name, file in own.items() if file.is_file()}
        state = load_file(models / f"{job.name}.safetensors")
        model.batchnorm = job.settings.batchnorm
        logits = predict_with(model, films, state, clients).astype(np.float64)
        table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=FINDINGS)
        for name in ("image_index", "client", "seed", "arm"):
            value = {"arm": job.arm, "seed": job.seed, "client": job.owner}
            table.insert(0, name, value.get(name, films.index["image_index"]))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


class Evaluation(NamedTuple):
    """The tables of notebook 04, and the findings that the primary mean is taken over."""

    metrics: pd.DataFrame
    differences: pd.DataFrame
    mean_over: list[str]


def evaluate_models(
    predictions: pd.DataFrame, films: ChestXrayDataset, seed: int, repeats: int = REPEATS
) -> Evaluation:
    """Return the rows of `metrics.csv` and of `differences.csv`, and the findings of the mean.

    `predictions` is what `predict_films` returned, or the file as read back. Test sets are `all`,
    each client, the subgroups of `test_groups`, and one film a patient; all but `all` have the
    AUROC alone. `seed` is empty on the rows of the mean over seeds; `client` is empty in the arm
    `local` on those of the mean over local models. The resamples of patients are the same for all.
    """
    index = films.index.set_index("image_index").loc[predictions["image_index"].unique()]
    groups = test_groups(index)
    findings = {
        name: evaluable_findings(_truth(index), index["patient_id"], list(family.values()))
        for family in groups.values()
        for name in family
    }
    # A mean of a part never holds a finding that the primary mean leaves out.
    findings = {k: [f for f in fs if f in findings[ALL_FILMS]] for k, fs in findings.items()}
    masks = {name: mask for family in groups.values() for name, mask in family.items()}
    resamples = patient_resamples(index["patient_id"], repeats, seed)
    draws = add_means(resample_models(predictions, index, resamples, masks, findings))
    tables = []
    for owner, by_set in draws.items():
        for name, values in by_set.items():
            labels = _truth(index[masks[name]])
            rows = tabulate_draws(values, labels, findings[name], METRICS[: len(values)])
            tables.append(_named(rows, dict(zip(OWNER, owner, strict=True)) | {"test_set": name}))
    clients = list(groups["client"])
    return Evaluation(
        pd.concat(tables, ignore_index=True), difference_rows(draws, clients), findings[ALL_FILMS]
    )


def test_groups(index: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Return the parts of the test films by family: a mask (n,) for each client and subgroup.

    The films of an unknown sex, age, view or scanner are in no subgroup of that family. One film a
    patient is the first by name.
    """
    groups = {"all": {ALL_FILMS: np.ones(len(index), dtype=bool)}}
    for family in ("client", "sex", "view", "scanner"):
        column = index[family].fillna("").astype(str)
        prefix = "" if family == "client" else f"{family}="
        names = sorted(set(column) - {""})
        groups[family] = {prefix + name: (column == name).to_numpy() for name in names}
    bands = {f"age={k}": index["age"].between(*ends, "left") for k, ends in AGES.items()}
    groups["age"] = {name: band.to_numpy() for name, band in bands.items() if band.any()}
    first = ~index.sort_index()["patient_id"].duplicated()
    groups["sensitivity"] = {ONE_FILM: first.reindex(index.index).to_numpy()}
    return groups


test_groups.__test__ = False  # pytest would take it for a test


def is_client(test_set: str) -> bool:
    """Tell whether a test set is that of a client, neither all films nor a subgroup."""
    return test_set not in (ALL_FILMS, ONE_FILM) and "=" not in test_set


def _truth(index: pd.DataFrame) -> np.ndarray:
    """Return the labels (n, 14) of an index as float."""
    return index[list(FINDINGS)].to_numpy(dtype=float)


def _named(rows: pd.DataFrame, names: Mapping[str, object]) -> pd.DataFrame:
    """Put constant columns before a table, in the order given."""
    for name in reversed(names):
        rows.insert(0, name, names[name])
    return rows


def resample_models(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    resamples: Resamples,
    masks: Mapping[str, np.ndarray],
    findings: Mapping[str, Sequence[str]],
) -> dict[Model, Draws]:
    """Compute each model's AUROC (on all films also average precision) in every resample.

    `index` holds the labels, in the order of `resamples`; `masks` names its parts, `findings` those
    of each part's mean. Findings are computed side by side, in as many threads as there are cores.
    """
    truth, result = _truth(index), {}
    wanted = {name: METRICS if name == ALL_FILMS else METRICS[:1] for name in masks}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for owner, rows in predictions.fillna({"client": ""}).groupby(OWNER, sort=False):
            scores = rows.set_index("image_index").loc[index.index, list(FINDINGS)].to_numpy()

            def one(k: int, scores: np.ndarray = scores) -> list[np.ndarray]:
                """Resample one finding on every part."""
                pair = truth[:, k], scores[:, k], resamples
                return [bootstrap(*pair, masks[name], wanted[name]) for name in masks]

            parts = zip(*pool.map(one, range(len(FINDINGS))), strict=True)
            arrays = dict(zip(masks, (np.stack(part, axis=1) for part in parts), strict=True))
            result[tuple(map(str, owner))] = {
                name: with_mean(values, findings[name]) for name, values in arrays.items()
            }
    return result


def add_means(draws: Mapping[Model, Draws]) -> dict[Model, Draws]:
    """Put the mean over local models beside each seed's, then the mean over seeds of each model."""
    result = dict(draws)
    for arm, seed in dict.fromkeys(owner[:2] for owner in draws if owner[2]):
        own = [values for owner, values in draws.items() if owner[:2] == (arm, seed)]
        result[arm, seed, ""] = _mean(own)
    for arm, client in dict.fromkeys((arm, client) for arm, _, client in result):
        by_seed = [values for owner, values in result.items() if owner[::2] == (arm, client)]
        result[arm, "", client] = _mean(by_seed)
    return result


def _mean(several: Sequence[Draws]) -> Draws:
    """Average the draws of several models, resample by resample."""
    return {name: np.mean([draws[name] for draws in several], axis=0) for name in several[0]}


def difference_rows(draws: Mapping[Model, Draws], clients: Sequence[str]) -> pd.DataFrame:
    """Return the rows of `differences.csv`: the federated model minus each other, paired.

    On all films: minus the centralised, each local model, and the mean local model. On the films of
    a client: minus the centralised, and minus that client's own model. See `tabulate_differences`;
    no row where the federated arm is alone, or was not trained.
    """
    others = {("centralised", ""): "centralised", ("local", ""): MEAN_LOCAL}
    others |= {("local", client): f"local {client}" for client in clients}
    tables = []
    for (arm, client), second in others.items():
        if ("federated", "", "") not in draws or (arm, "", client) not in draws:
            continue
        on = [ALL_FILMS, *clients] if arm == "centralised" else [ALL_FILMS, *filter(None, [client])]
        seeds = [seed for a, seed, c in draws if (a, c) == (arm, client) and seed]
        for name in on:
            pairs = [(draws["federated", s, ""][name], draws[arm, s, client][name]) for s in seeds]
            whole = draws["federated", "", ""][name] - draws[arm, "", client][name]
            by_seed = np.array([(one - two)[..., 0] for one, two in pairs])
            rows = tabulate_differences(whole, by_seed, METRICS[: len(whole)])
            names = {"test_set": name, "first": "federated", "second": second}
            tables.append(_named(rows, names))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=DIFFERENCES)


def tabulate(metrics: pd.DataFrame) -> pd.DataFrame:
    """Lay the table out for reading: a row a finding, a column an arm and metric, with intervals.

    Shown are the test set `all` and the means over seeds; of the local models their mean.
    """
    rows = over_seeds(metrics)
    rows = rows[(rows["client"] == "") & rows["metric"].isin(METRICS)]
    texts = [_text(row) for row in rows.itertuples()]
    wide = rows.assign(text=texts, arm=rows["arm"].replace("local", MEAN_LOCAL))
    wide = wide.pivot(index="finding", columns=["metric", "arm"], values="text")
    order = list(dict.fromkeys(zip(rows["metric"], rows["arm"], strict=True)))
    columns = [(metric, MEAN_LOCAL if arm == "local" else arm) for metric, arm in order]
    wide = wide.loc[[MEAN, *FINDINGS], sorted(columns, key=lambda c: METRICS.index(c[0]))]
    words = {"auroc": "AUROC", "average_precision": "average precision"}
    wide.columns = [f"{words[metric]}, {arm}" for metric, arm in wide.columns]
    means = rows.loc[rows["finding"] == MEAN, "positives"]
    return wide.rename({MEAN: f"mean of {means.max()}"}).rename_axis(index=None)


def over_seeds(metrics: pd.DataFrame, test_set: str = ALL_FILMS) -> pd.DataFrame:
    """Keep the rows of the means over seeds on one test set."""
    return metrics[(metrics["seed"] == "") & (metrics["test_set"] == test_set)]


def _text(row: Any) -> str:
    """Write a value of the metrics with its interval, or say why there is none."""
    if not np.isnan(row.value):
        return with_interval(row)
    return "not defined" if row.finding == MEAN else undefined(row.positives, row.n)


def tabulate_differences_text(differences: pd.DataFrame) -> pd.DataFrame:
    """Lay the differences of the mean AUROC out for reading, a row a pair and test set."""
    rows = differences[(differences["finding"] == MEAN) & (differences["metric"] == "auroc")]
    table = {
        "films": rows["test_set"],
        "difference of mean AUROC": rows["first"] + " − " + rows["second"],
        "value (95 % interval)": [_signed(row) for row in rows.itertuples()],
        "by seed": [_span(row.seed_low, row.seed_high) for row in rows.itertuples()],
        "seeds with its sign": [f"{r.seeds_agree} of {r.seeds}" for r in rows.itertuples()],
        "verdict": rows["verdict"],
    }
    return pd.DataFrame(table)


def _signed(row: Any, name: str = "") -> str:
    """Write a difference with its interval and its sign."""
    if np.isnan(row.ci_low):
        return f"{row.value:+.3f} (no interval: too few films)"
    return f"{row.value:+.3f} ({name}{row.ci_low:+.3f} to {row.ci_high:+.3f})"


def _span(low: float, high: float, sign: str = "+") -> str:
    """Write the smallest and the largest of several values, once if they look the same."""
    ends = dict.fromkeys([f"{low:{sign}.3f}", f"{high:{sign}.3f}"])
    return " to ".join(ends)


def with_interval(row: Any, name: str = "") -> str:
    """Write a value of the metrics with its interval, or say that there is none."""
    if np.isnan(row.ci_low):
        return f"{row.value:.3f} (no interval: too few films)"
    return f"{row.value:.3f} ({name}{row.ci_low:.3f} to {row.ci_high:.3f})"


def write_predictions(predictions: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Write `predictions.csv.gz` and return it as read back: metrics are computed from the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gzip = {"method": "gzip", "mtime": 0}  # no time of day in the file: equal runs, equal bytes
    predictions.to_csv(path, index=False, float_format="%.9g", compression=gzip)
    return read_predictions(path)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read `predictions.csv.gz`."""
    return pd.read_csv(path, dtype={"client": str}, keep_default_na=False)


def headline(result: Evaluation, source: str) -> list[str]:
    """Say in plain sentences what the tables show; each begins with the source of the films."""
    means = result.metrics[
        (result.metrics["finding"] == MEAN) & (result.metrics["metric"] == "auroc")
    ]
    lines = [
        *_arms_in_words(means),
        *_differences_in_words(result.differences, list(means["arm"].unique())),
        *_hospitals_in_words(means),
        _limits_in_words(result, means, source),
    ]
    return [f"{source}: {line}" for line in lines]


def _arms_in_words(means: pd.DataFrame) -> list[str]:
    """Say the mean AUROC of each arm on all test films, and how far the seeds lie apart."""
    lines, rows = [], over_seeds(means)
    for row in rows[rows["client"] == ""].itertuples():
        same = (
            (means["arm"] == row.arm) & (means["client"] == "") & (means["test_set"] == ALL_FILMS)
        )
        seeds = means[same & (means["seed"] != "")]["value"]
        spread = _span(seeds.min(), seeds.max(), "")
        of = f"mean of {len(seeds)} seeds, {spread}" if len(seeds) > 1 else "one training seed"
        name = f"the {MEAN_LOCAL}" if row.arm == "local" else row.arm
        if np.isnan(row.value):
            lines.append(f"{name} has no mean AUROC: too few positive test patients.")
            continue
        lines.append(
            f"{name} reaches a mean AUROC of {with_interval(row, '95 % interval ')} over"
            f" {row.positives} findings on {row.n:,} test films ({of})."
        )
    return lines


def _differences_in_words(differences: pd.DataFrame, arms: list[str]) -> list[str]:
    """Say which arm wins, by how much, and whether that is shown."""
    if differences.empty:
        alone = (
            f"only one arm was trained ({arms[0]})" if len(arms) == 1 else "federated is missing"
        )
        return [f"{alone}: no difference to compute."]
    whole = differences[(differences["test_set"] == ALL_FILMS) & (differences["metric"] == "auroc")]
    lines = []
    for second, rows in whole.groupby("second", sort=False):
        if second in ("centralised", MEAN_LOCAL):
            lines.append(_one_difference(second, rows.set_index("finding")))
    means = whole[(whole["finding"] == MEAN) & ~whole["second"].isin(["centralised", MEAN_LOCAL])]
    better, worse = (means[(means["verdict"] == SHOWN) & sign] for sign in _signs(means))
    if len(means):
        lines.append(
            f"on all test films federated is shown to be above {len(better)} and below"
            f" {len(worse)} of {len(means)} local models."
        )
    return lines


def _signs(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Tell which differences are above, and which below 0."""
    return rows["value"] > 0, rows["value"] < 0


def _one_difference(second: str, rows: pd.DataFrame) -> str:
    """Say the difference to one other model: of the mean, and for how many findings."""
    mean, second = rows.loc[MEAN], "the " + second.removesuffix(" model") + " model"
    if np.isnan(mean["value"]):
        return f"federated against {second}: not defined, for want of positive test patients."
    seeds = f"{_span(mean['seed_low'], mean['seed_high'])} over {mean['seeds']} seeds"
    size = f"{_signed(mean, '95 % interval ')}; {seeds if mean['seeds'] > 1 else 'one seed'}"
    side = "above" if mean["value"] > 0 else "below"
    verdict = (
        f"is shown to be {side}" if mean["verdict"] == SHOWN else "is not shown to differ from"
    )
    single = rows.drop(MEAN).query("verdict != 'not defined'")
    shown = single[single["verdict"] == SHOWN]
    every = len(shown) == len(single)
    parts = [
        f"{word} for {'all' if every and sign.all() else ', '.join(shown.index[sign])}"
        for word, sign in zip(("above", "below"), _signs(shown), strict=True)
        if sign.any()
    ]
    return (
        f"federated {verdict} {second} in mean AUROC: {size}. Of {len(single)} findings, after"
        f" Holm's adjustment: {' and '.join(parts) or 'none shown'}."
    )


def _hospitals_in_words(means: pd.DataFrame) -> list[str]:
    """Name the hospital on whose test films the federated model is worst."""
    rows = hospitals(means, means["arm"].iloc[0])
    rows = rows[rows["value"].notna()].sort_values("value")
    if len(rows) < 2:
        return []
    worst, best = rows.iloc[0], rows.iloc[-1]
    known = not np.isnan(worst["ci_high"] + best["ci_low"])
    apart = "lie apart" if worst["ci_high"] < best["ci_low"] else "overlap"
    return [
        f"the {worst['arm']} model is worst on the films of {worst['test_set']}: mean AUROC"
        f" {with_interval(worst)} over {worst['positives']} findings on {worst['n']:,} films,"
        f" against {with_interval(best)} at {best['test_set']}"
        f"{f'; the intervals {apart}' if known else ''}."
    ]


def hospitals(metrics: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Keep an arm's mean AUROC on the test films of each client, over seeds (and local models)."""
    chosen = (metrics["arm"] == arm) & (metrics["seed"] == "") & (metrics["client"] == "")
    mean = (metrics["finding"] == MEAN) & (metrics["metric"] == "auroc")
    return metrics[chosen & mean & metrics["test_set"].map(is_client)]


def _limits_in_words(result: Evaluation, means: pd.DataFrame, source: str) -> str:
    """Say what limits all this: where the labels come from, and how few films there are."""
    known = {
        "phantom": "these films are drawn, not taken: nothing here is evidence about patients",
        "own": "labels are those of your own table",
    }
    mined = "labels were mined from reports by text, and chest drains give Pneumothorax away"
    labels = known.get(source.split()[0], mined)
    without = [finding for finding in FINDINGS if finding not in result.mean_over]
    few = f"the mean leaves out {', '.join(without)} (too few positive test patients)"
    films = f"{over_seeds(means)['n'].max():,} test films"
    return f"limits: {labels}; {films}; {few if without else 'the mean is over all findings'}."


def write_summary(settings: Settings, result: Evaluation, source: str) -> dict[str, Any]:
    """Write `metrics.csv`, `differences.csv` and `summary.json`, which says how to repeat them."""
    folder = settings.run / "evaluation"
    for name, table in result._asdict().items():
        if isinstance(table, pd.DataFrame):
            write_atomic(folder / f"{name}.csv", table.to_csv(index=False).encode())
    files = [settings.run / "global_model.safetensors", folder / "predictions.csv.gz"]
    files += sorted((settings.run / "models").glob("*.safetensors"))
    means = over_seeds(result.metrics[result.metrics["finding"] == MEAN])
    summary = {
        "headline": headline(result, source),
        "mean_over": result.mean_over,
        "means": means.astype(object).where(means.notna(), None).to_dict("records"),
        "settings": json.loads((settings.run / "config.json").read_text()),
        "privacy": read_budget(settings.run).to_dict("records"),
        "fingerprint": read_report(settings.prepared)["fingerprint"],
        "environment": environment(),
        "git_revision": git_revision(),
        "sha256": {str(f.relative_to(settings.run)): _sha256(f) for f in files if f.is_file()},
    }
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of the evaluation; an empty name stays empty text, and a seed is text too."""
    names = {name: str for name in (*OWNER, "test_set", "finding")}
    table = pd.read_csv(path, dtype=names)
    texts = [name for name in names if name in table]
    if "seed" in table:  # beside an empty seed pandas writes 0 as 0.0
        table["seed"] = table["seed"].str.removesuffix(".0")
    return table.fillna(dict.fromkeys(texts, ""))


def mean_auroc_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the mean AUROC over all test films of a table that `read_table` read."""
    same = {"test_set": ALL_FILMS, "finding": MEAN, "metric": "auroc"}
    return table[(table[list(same)] == pd.Series(same)).all(axis=1)]


def training_cost(history: pd.DataFrame, local_epochs: int) -> pd.DataFrame:
    """Return what each arm had spent at each round, and the AUROC it then had on validation films.

    Columns: `arm, seed, round, films_seen, gigabytes, val_auroc`. Films count once each time they
    are trained on; gigabytes are the states sent, both ways. Of the arm `local` the films of all
    models are summed, and their AUROC averaged.
    """
    rows = history[(history["client"].fillna("") == "") | (history["arm"] == "local")]
    rows = rows.assign(sent=rows["bytes_up"] + rows["bytes_down"])
    by_round = rows.groupby(["arm", "seed", "round"], sort=False)
    table = by_round.agg(
        films_seen=("examples", "sum"), gigabytes=("sent", "sum"), val_auroc=("val_auroc", "mean")
    ).reset_index()
    spent = table.groupby(["arm", "seed"])[["films_seen", "gigabytes"]].cumsum()
    table["films_seen"] = spent["films_seen"] * local_epochs
    return table.assign(gigabytes=spent["gigabytes"] / 1e9)


def compare_runs(runs: Sequence[Settings], repeats: int = REPEATS) -> Evaluation:
    """Lay several evaluated runs on the same prepared data side by side, paired by patient.

    Returns an `Evaluation` of the test set `all` alone: `metrics` has a first column `run`, and
    means over seeds only; `differences` are those between the federated arms of every two runs,
    whose names are `first` and `second`, by seed where both runs have it. Raises InputError for a
    run that notebook 04 has not evaluated, and for one on other data.
    """
    check_fingerprint(runs[0], read_report(runs[0].prepared))
    fingerprints = {run.name: _fingerprint(run) for run in runs}
    for name, fingerprint in fingerprints.items():
        if fingerprint != fingerprints[runs[0].name]:
            raise InputError(
                f"runs {runs[0].name} and {name} do not compare: they were evaluated on different"
                f" data ({fingerprints[runs[0].name][:16]} and {fingerprint[:16]})"
            )
    predictions = [read_predictions(run.run / "evaluation" / "predictions.csv.gz") for run in runs]
    index = read_index(runs[0].prepared).set_index("image_index")
    index = index.loc[predictions[0]["image_index"].unique()]
    findings = {ALL_FILMS: evaluable_findings(_truth(index), index["patient_id"])}
    resamples = patient_resamples(index["patient_id"], repeats, runs[0].seed)
    masks = {ALL_FILMS: np.ones(len(index), dtype=bool)}
    draws, tables = {}, []
    for run, table in zip(runs, predictions, strict=True):
        draws[run.name] = add_means(resample_models(table, index, resamples, masks, findings))
        for (arm, seed, client), values in draws[run.name].items():
            if not seed and not client:
                rows = tabulate_draws(values[ALL_FILMS], _truth(index), findings[ALL_FILMS])
                names = {
                    "run": run.name,
                    "arm": arm,
                    "seed": "",
                    "client": "",
                    "test_set": ALL_FILMS,
                }
                tables.append(_named(rows, names))
    pairs = [_run_difference(draws, *pair) for pair in combinations(draws, 2)]
    differences = pd.concat([pd.DataFrame(columns=DIFFERENCES), *filter(len, pairs)])
    return Evaluation(pd.concat(tables, ignore_index=True), differences, findings[ALL_FILMS])


def _run_difference(draws: Mapping[str, dict[Model, Draws]], one: str, two: str) -> pd.DataFrame:
    """Tabulate the difference between two runs' federated arms; empty where one has none."""
    first, second = (
        {k: v[ALL_FILMS] for k, v in draws[n].items() if k[::2] == FEDERATED} for n in (one, two)
    )
    if not first or not second:
        return pd.DataFrame(columns=DIFFERENCES)
    both = [key for key in first if key in second and key[1]]
    by_seed = np.array([(first[key] - second[key])[..., 0] for key in both])
    whole = first["federated", "", ""] - second["federated", "", ""]
    rows = tabulate_differences(whole, by_seed if both else whole[None, ..., 0])
    return _named(rows, {"test_set": ALL_FILMS, "first": one, "second": two})


def _fingerprint(settings: Settings) -> str:
    """Return the fingerprint of the data that a run was evaluated on, or raise InputError."""
    path = settings.run / "evaluation" / "summary.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 04_evaluate on {settings.name} first")
    return json.loads(path.read_text())["fingerprint"]


def record_files(settings: Settings, *names: str) -> None:
    """Add files of the run folder to the hashes in `summary.json`, for `verify_run` to check.

    For what is written after the summary; a name that is not there is left out.
    """
    path = settings.run / "evaluation" / "summary.json"
    summary = json.loads(path.read_text())
    files = {name: settings.run / name for name in names}
    summary["sha256"] |= {name: _sha256(file) for name, file in files.items() if file.is_file()}
    write_atomic(path, json.dumps(summary, indent=1).encode())


def verify_run(run: Path) -> list[str]:
    """Check a run folder against its own summary; return what is wrong, a line each.

    Hashes of models and predictions, the hash of each best model in the history, the fingerprint of
    the prepared data, and the metrics, computed again from `predictions.csv.gz`. Raises InputError
    if there is no summary.
    """
    path = run / "evaluation" / "summary.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: run notebook 04_evaluate first")
    summary, settings = json.loads(path.read_text()), read_run(str(run.parent.parent), run.name)
    files = {name: run / name for name in summary["sha256"]}
    wrong = [f"{name} is missing" for name, file in files.items() if not file.is_file()]
    there = {name: file for name, file in files.items() if file.is_file()}
    wrong += [f"{k} has changed" for k, f in there.items() if _sha256(f) != summary["sha256"][k]]
    history = set(pd.read_csv(run / "history.csv")["state_sha256"].dropna())
    # Local BatchNorm is in the file of a model, but not in what travelled and was hashed.
    for name in sorted(there) if settings.batchnorm != "local" else ():
        model = name.startswith("models/") and name != "models/trunk.safetensors"
        if model and state_hash(load_file(there[name])) not in history:
            wrong.append(f"{name} is the state of no round in history.csv")
    if summary["fingerprint"] != read_report(settings.prepared)["fingerprint"]:
        return [*wrong, f"{settings.prepared} holds other data: metrics cannot be recomputed"]
    return wrong + _recompute(run, settings)


def _recompute(run: Path, settings: Settings) -> list[str]:
    """Compute the tables again from the predictions as written; name the rows that differ."""
    predictions = read_predictions(run / "evaluation" / "predictions.csv.gz")
    again = evaluate_models(predictions, read_films(settings), settings.seed)
    wrong = []
    for name, keys in (("metrics", OWNER), ("differences", ["first", "second"])):
        stored = read_table(run / "evaluation" / f"{name}.csv")
        stored = stored[stored["metric"].isin(METRICS)]
        keys = [*keys, "test_set", "finding", "metric"]
        both = stored.merge(getattr(again, name), on=keys, how="outer", suffixes=("", "_again"))
        pairs = [both[[c, f"{c}_again"]].to_numpy(float).T for c in ("value", "ci_low", "ci_high")]
        same = np.all([np.isclose(*pair, atol=1e-12, equal_nan=True) for pair in pairs], axis=0)
        rows = both[~same][[*keys, "value", "value_again"]].astype(object).to_numpy().tolist()
        wrong += [f"{name}.csv says {r[-2]} for {r[:-2]}, computed again {r[-1]}" for r in rows]
    return wrong


def git_revision() -> str:
    """Return the revision of the code, with a plus where files differ; empty outside git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""  # an installed package or a Kaggle data set has no history
    return done.stdout.strip()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_fingerprint(settings: Settings, report: dict[str, Any]) -> None:
    """Raise InputError where the prepared data are not those that the run was trained on.

    A run over a network has no fingerprint: its films never left the hospitals.
    """
    trained = json.loads((settings.run / "config.json").read_text())["fingerprint"]
    if trained and report["fingerprint"] != trained:
        raise InputError(
            f"run {settings.name} was trained on data {trained[:16]}, but {settings.prepared} holds"
            f" {report['fingerprint'][:16]}: run notebook 02 again with that run's parameters"
        )


def read_films(settings: Settings) -> ChestXrayDataset:
    """Open the prepared films with each patient's client, as `clients.csv` of the run has it."""
    clients = pd.read_csv(settings.run / "clients.csv", dtype=str).set_index("patient_id")["client"]
    index = read_index(settings.prepared)
    return ChestXrayDataset(
        settings.prepared, index.assign(client=index["patient_id"].map(clients))
    )
