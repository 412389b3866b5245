"""metrics.csv: every model, finding and test set, with intervals over patients."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..base.device import count_cores
from ..base.findings import findings_of
from ..dataset import ChestXrayDataset
from . import tables
from .bootstrap import Resamples, bootstrap, interval, patient_resamples, variance
from .differences import Enough, difference_rows
from .intervals import auroc_interval, mean_auroc_interval
from .tables import ALL_FILMS, LEAST_PATIENTS, MEAN, METRICS, OWNER, Draws, Owner

REPEATS = 1000  # resamples of the test patients; under 560 no p survives Holm over 14 findings
AGES = {"0-39": 0, "40-59": 40, "60+": 60}  # years: from
Groups = Mapping[str, Mapping[str, np.ndarray]]  # by family, then name: which films (n,) are in it


def evaluate_models(
    predictions: pd.DataFrame, films: ChestXrayDataset, seed: int, repeats: int = REPEATS
) -> tables.Evaluation:
    """Return the rows of `metrics.csv` and of `differences.csv`, and the findings of the mean.

    `predictions` is what `predict_films` returned, or the file as read back. Test sets are `all`,
    each client, the subgroups of `test_groups`, and one film a patient; see `evaluate_parts`.
    """
    index = films.index.set_index("image_index").loc[predictions["image_index"].unique()]
    groups = test_groups(index)
    draws, metrics, enough, mean_over = evaluate_parts(predictions, index, groups, seed, repeats)
    rows = difference_rows(draws, list(groups["client"]), enough)
    return tables.Evaluation(metrics, rows, mean_over)


def evaluate_parts(
    predictions: pd.DataFrame, index: pd.DataFrame, groups: Groups, seed: int, repeats: int
) -> tuple[dict[Owner, Draws], pd.DataFrame, Enough, list[str]]:
    """Return draws and metrics by model, each part's findings with patients enough, the mean's.

    `index` holds the labels by `image_index`; `groups` are its parts by family, first all films.
    All parts but `all` have the AUROC alone, and `on_all_films` of a mean is that over the same
    findings on all films. `seed` is empty on the rows of the mean over seeds; `client` is empty in
    the arm `local` on those of the mean over local models. All share the resamples of patients.
    """
    masks = {name: mask for family in groups.values() for name, mask in family.items()}
    truth, patients = tables.truth_of(index), index["patient_id"].to_numpy()
    counts = {name: Counts.of(truth[mask], patients[mask]) for name, mask in masks.items()}
    names = findings_of(index)
    enough = {name: pd.Series(count.enough, names) for name, count in counts.items()}
    chosen = _findings_of_means(truth, patients, groups, enough)
    resamples = patient_resamples(patients, repeats, seed)
    draws = add_means(resample_models(predictions, index, resamples, masks, chosen), chosen)
    mean_over = [names[k] for k in chosen[ALL_FILMS]]
    return draws, tabulate_models(names, draws, counts, chosen), enough, mean_over


def tabulate_models(
    names: Sequence[str],
    draws: Mapping[Owner, Draws],
    counts: Mapping[str, "Counts"],
    chosen: Mapping[str, list[int]],
) -> pd.DataFrame:
    """Tabulate the draws of all models on each part of the films: the rows of metrics.csv."""
    parts = []
    for owner, by_part in draws.items():
        for name, values in by_part.items():
            rows = tabulate_draws(names, values, counts[name], chosen[name])
            mine = chosen[name]
            whole = by_part[ALL_FILMS][0, mine, 0].mean() if mine else np.nan
            rows["on_all_films"] = np.where(rows["finding"] == MEAN, whole, np.nan)
            parts.append(tables.name_model(tables.name_rows(rows, {"test_set": name}), owner))
    return pd.concat(parts, ignore_index=True)


def _findings_of_means(
    truth: np.ndarray, patients: np.ndarray, groups: Groups, enough: Enough
) -> dict[str, list[int]]:
    """Return by part the positions of the findings of its mean, none where it has too few patients.

    They are those that all parts of a family have enough of, so that these compare. Hospitals that
    looked for different findings share few or none: then each has those that it and the others
    together have enough of.
    """
    chosen: dict[str, list[int]] = {}
    for kind, family in groups.items():
        shared = evaluable_findings(truth, patients, list(family.values()))
        if kind == "client":
            at_home = shared
        elif kind == "outside":  # to be laid beside home
            shared = [k for k in shared if k in at_home]
        # A mean of a part never holds a finding that the primary mean leaves out.
        shared = [k for k in shared if k in chosen.get(ALL_FILMS, shared)]
        for name in family:
            chosen[name] = shared if enough[name].iloc[shared].all() else []
    homes = groups.get("client", {})
    if len({(~np.isnan(truth[mask])).any(axis=0).tobytes() for mask in homes.values()}) > 1:
        for name in homes:
            both = enough[name] & enough.get(f"{tables.OUTSIDE}{name}", True)
            own = [k for k in chosen[ALL_FILMS] if both.iloc[k]]
            chosen |= {part: own for part in (name, f"{tables.OUTSIDE}{name}") if part in enough}
    return chosen


def test_groups(index: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Return the parts of the test films by family: a mask (n,) for each client, the films of all
    others than a client, and each subgroup.

    The films of an unknown sex, age, view or scanner are in no subgroup of that family. One film a
    patient is the first by name.
    """
    bands = pd.cut(index["age"], [*AGES.values(), np.inf], right=False, labels=[*AGES])
    index = index.assign(age=bands.astype(object))
    groups = {"all": {ALL_FILMS: np.ones(len(index), dtype=bool)}}
    for family in ("client", "sex", "view", "scanner", "age"):
        column = index[family].fillna("").astype(str)
        prefix = "" if family == "client" else f"{family}="
        names = sorted(set(column) - {""})
        groups[family] = {prefix + name: (column == name).to_numpy() for name in names}
        if family == "client" and len(names) > 1:
            homes = groups[family].items()
            groups["outside"] = {f"{tables.OUTSIDE}{name}": ~own for name, own in homes}
    first = ~index.sort_index()["patient_id"].duplicated()
    groups["sensitivity"] = {tables.ONE_FILM: first.reindex(index.index).to_numpy()}
    return groups


test_groups.__test__ = False  # pytest would take it for a test


def resample_models(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    resamples: Resamples,
    masks: Mapping[str, np.ndarray],
    chosen: Mapping[str, Sequence[int]],
) -> dict[Owner, Draws]:
    """Compute each model's AUROC (on all films also average precision) in every resample.

    `index` holds the labels, in the order of `resamples`; `masks` names its parts, `chosen` the
    findings of each part's mean. Findings are computed side by side, a thread a core.
    """

    def on_each_part(truth: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
        """Resample one finding."""
        wanted = {ALL_FILMS: METRICS}
        return [
            bootstrap(truth, scores, resamples, mask, wanted.get(name, METRICS[:1]))
            for name, mask in masks.items()
        ]

    tables.check_once(predictions)
    truth, result = tables.truth_of(index), {}
    with ThreadPoolExecutor(min(8, count_cores())) as pool:
        for owner, rows in predictions.fillna({"client": ""}).groupby(OWNER, sort=False):
            scores = tables.truth_of(rows.set_index("image_index").loc[index.index])
            parts = zip(*pool.map(on_each_part, truth.T, scores.T), strict=True)
            result[tuple(map(str, owner))] = {
                name: with_mean(np.stack(part, axis=1), chosen[name])
                for name, part in zip(masks, parts, strict=True)
            }
    return result


def add_means(
    draws: Mapping[Owner, Draws], chosen: Mapping[str, Sequence[int]]
) -> dict[Owner, Draws]:
    """Put the mean over local models beside each seed's, then the mean over seeds of each model."""
    result = dict(draws)
    for arm, seed in dict.fromkeys(owner[:2] for owner in draws if owner[2]):
        own = [values for owner, values in draws.items() if owner[:2] == (arm, seed)]
        result[arm, seed, ""] = _mean(own, chosen)
    for arm, client in dict.fromkeys((arm, client) for arm, _, client in result):
        by_seed = [values for owner, values in result.items() if owner[::2] == (arm, client)]
        result[arm, "", client] = _mean(by_seed, chosen)
    return result


def _mean(several: Sequence[Draws], chosen: Mapping[str, Sequence[int]]) -> Draws:
    """Average the draws of several models, resample by resample.

    A finding that not all were taught is averaged over those that were, and so is its share in
    the mean over findings.
    """
    result = {}
    for name in several[0]:
        draws = np.array([one[name] for one in several])
        result[name], untaught = draws.mean(axis=0), np.isnan(draws[..., :-1, 0])
        if (untaught.any(axis=0) & ~untaught.all(axis=0)).any():
            by_finding = np.ma.masked_invalid(draws[..., :-1, :]).mean(axis=0).filled(np.nan)
            result[name] = with_mean(by_finding, chosen[name])
    return result


def count_patients(truth: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the patients with a positive film, and with a negative one, by finding: (findings,).

    `truth` is (n, findings) of 0, 1 or NaN, `patients` (n,).
    """
    known = pd.DataFrame(truth)
    positive, negative = ((known == mark).groupby(patients).any().sum() for mark in (1, 0))
    return positive.to_numpy(), negative.to_numpy()


def evaluable_findings(
    truth: np.ndarray, patients: np.ndarray, groups: Sequence[np.ndarray | slice] = (slice(None),)
) -> list[int]:
    """Return the positions of the findings that the macro mean is taken over.

    Those with positive films of at least LEAST_PATIENTS different patients, and negative films of
    as many, in each of the `groups` (masks (n,); without any all films are one), so that groups
    are compared over the same findings. A group that has no such finding is passed over. It depends
    on the labels alone, never on a model; arguments as in `count_patients`.
    """
    counts = [np.minimum(*count_patients(truth[mask], patients[mask])) for mask in groups]
    enough = [count >= LEAST_PATIENTS for count in counts if (count >= LEAST_PATIENTS).any()]
    kept = np.all(enough, axis=0) if enough else np.zeros(truth.shape[1], dtype=bool)
    return np.flatnonzero(kept).tolist()


def with_mean(values: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """Append the mean over some positions to values (..., findings, repeats): NaN if one is NaN."""
    none = np.full_like(values[..., :1, :], np.nan)
    mean = values[..., chosen, :].mean(axis=-2, keepdims=True) if len(chosen) else none
    return np.concatenate([values, mean], axis=-2)


def tabulate_draws(
    names: Sequence[str], draws: np.ndarray, counts: "Counts", chosen: Sequence[int]
) -> pd.DataFrame:
    """Tabulate the values of a model with 95 % intervals: each metric's findings, then `mean`.

    `draws` (metrics, findings + 1, 1 + repeats) is `bootstrap` by finding, of these `names`, and
    `with_mean` over those `chosen`; `counts` are of the films it was taken on. An AUROC has a score
    interval (`auroc_interval`), their mean one on the logit's scale (`mean_auroc_interval`), all
    else the percentile interval; with fewer patients than LEAST_PATIENTS of either kind there is
    none. Columns: `finding, metric, value, ci_low, ci_high, n, positives`. `n` is the number of
    labelled films, `positives` that of positive films; in the row `mean` the number of films, and
    of findings in the mean.
    """
    count = {"n": [*counts.known, counts.films], "positives": [*counts.positives, len(chosen)]}
    positive, negative = counts.patients
    parts = []
    for metric, values in zip(METRICS, draws, strict=False):
        ends, spread = np.full((len(values), 2), np.nan), variance(values)
        for k in np.flatnonzero(counts.enough):
            ends[k] = interval(values[k, 1:])
            if metric == "auroc":
                ends[k] = auroc_interval(values[k, 0], spread[k], positive[k], negative[k])
        ends[-1] = interval(values[-1, 1:])
        if metric == "auroc" and len(chosen):
            ends[-1] = mean_auroc_interval(values[-1, 0], spread[-1], min(positive[chosen]))
        about = {"finding": [*names, MEAN], "metric": metric, "value": values[:, 0]}
        parts.append(pd.DataFrame(about | {"ci_low": ends[:, 0], "ci_high": ends[:, 1]} | count))
    return pd.concat(parts, ignore_index=True)


class Counts(NamedTuple):
    """Of some test films: how many there are, and of each finding (findings,) what is known."""

    films: int
    known: np.ndarray  # films with a label
    positives: np.ndarray  # films
    patients: np.ndarray  # (2, findings): with a positive film, and with a negative one

    @classmethod
    def of(cls, truth: np.ndarray, patients: np.ndarray) -> "Counts":
        """Count labels (n, findings) of 0, 1 or NaN, of films whose patients are given (n,)."""
        whole = (~np.isnan(truth)).sum(axis=0), (truth == 1).sum(axis=0)
        return cls(len(truth), *whole, np.array(count_patients(truth, patients)))

    @property
    def enough(self) -> np.ndarray:
        """Which findings have patients enough of both kinds to be judged."""
        return self.patients.min(axis=0) >= LEAST_PATIENTS
