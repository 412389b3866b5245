"""Sentences that are computed from tables."""

import math
from statistics import NormalDist

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import FINDINGS
from ..base.parameters import Parameters
from ..base.scores import undefined
from ..run import read_budget
from . import explain, membership, tables
from .intervals import Z
from .metrics import count_patients
from .tables import ALL_FILMS, LEAST_PATIENTS, MEAN, MEAN_LOCAL, SHOWN, with_interval

NAMED = " (95 % interval {} to {})"
VERDICTS = [SHOWN, tables.NOT_SHOWN]


def headline(result: tables.Evaluation, source: str) -> list[str]:
    """Say in plain sentences what the tables show; each begins with the source of the films."""
    means = tables.mean_auroc_rows(result.metrics)
    lines = [
        *_arms_in_words(means),
        *_differences_in_words(result.differences, list(means["arm"].unique())),
        *_hospitals_in_words(means),
        _limits_in_words(result, means, source),
    ]
    return [f"{source}: {line}" for line in lines]


def _arms_in_words(means: pd.DataFrame) -> list[str]:
    """Say the mean AUROC of each arm on all test films, and how far the seeds lie apart."""
    lines = []
    for row in tables.rows_of(means, seed="", client="", test_set=ALL_FILMS).itertuples():
        name = f"the {MEAN_LOCAL}" if row.arm == "local" else row.arm
        if np.isnan(row.value):
            lines.append(f"{name} has no mean AUROC: too few test patients.")
            continue
        same = tables.rows_of(means, arm=row.arm, client="", test_set=ALL_FILMS)
        seeds = same[same["seed"] != ""]["value"]
        spread = tables.span(seeds.min(), seeds.max(), "")
        of = f"mean of {len(seeds)} seeds, {spread}" if len(seeds) > 1 else "one training seed"
        lines.append(
            f"{name} reaches a mean AUROC of {with_interval(row, form=NAMED)} over"
            f" {row.positives} findings on {row.n:,} test films ({of})."
        )
    return lines


def _differences_in_words(differences: pd.DataFrame, arms: list[str]) -> list[str]:
    """Say which arm wins, by how much, and whether that is shown."""
    if differences.empty:
        alone = f"only one arm was trained ({arms[0]})"
        return [f"{alone if len(arms) == 1 else 'federated is missing'}: no difference to compute."]
    whole = tables.rows_of(differences, test_set=ALL_FILMS, metric="auroc")
    single = ~whole["second"].isin(["centralised", MEAN_LOCAL])
    lines = [
        _one_difference(second, rows.set_index("finding"))
        for second, rows in whole[~single].groupby("second", sort=False)
    ]
    means = whole[single & (whole["finding"] == MEAN) & whole["verdict"].isin(VERDICTS)]
    shown = means.loc[means["verdict"] == SHOWN, "value"]
    if len(means):
        lines.append(
            f"on all test films federated is shown to be above {(shown > 0).sum()} and below"
            f" {(shown < 0).sum()} of {len(means)} local models."
        )
    return lines


def _one_difference(second: str, rows: pd.DataFrame) -> str:
    """Say the difference to one other model: of the mean, and for how many findings."""
    mean, second = rows.loc[MEAN], "the " + second.removesuffix(" model") + " model"
    if np.isnan(mean["value"]):
        return f"federated against {second}: not defined, for want of test patients."
    if mean["verdict"] == tables.ONE_SEED:
        return (
            f"federated against {second}: {mean['value']:+.3f} in mean AUROC with one training"
            " seed. Another may turn it around, so nothing is judged: train at least two, better"
            " five (seeds=0,1,2,3,4)."
        )
    size = (
        f"{with_interval(mean, '+', NAMED)} over patients and {mean['seeds']} seeds; five seeds a"
        f" side would show {mean['detectable_5']:.3f} in four of five repetitions"
    )
    side = "above" if mean["value"] > 0 else "below"
    shown = mean["verdict"] == SHOWN
    verdict = f"is shown to be {side}" if shown else "is not shown to differ from"
    single = rows.drop(MEAN).query("verdict in @VERDICTS")
    value = single.loc[single["verdict"] == SHOWN, "value"]
    signs = {"above": value.index[value > 0], "below": value.index[value < 0]}
    parts = [
        f"{word} for {'all' if len(names) == len(single) else ', '.join(names)}"
        for word, names in signs.items()
        if len(names)
    ]
    return (
        f"federated {verdict} {second} in mean AUROC: {size}. Of {len(single)} findings, after"
        f" Holm's adjustment: {' and '.join(parts) or 'none shown'}."
    )


def _hospitals_in_words(means: pd.DataFrame) -> list[str]:
    """Name the hospital on whose test films the first arm is worst, if it stands out."""
    rows = tables.hospitals(means, means["arm"].iloc[0]).dropna(subset=["value", "ci_low"])
    if len(rows) < 2:
        return []
    worst, best = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
    # The extremes of many lie apart by chance: wider for the number of pairs (Bonferroni).
    wider = NormalDist().inv_cdf(1 - 0.025 / math.comb(len(rows), 2)) / Z
    up = worst["value"] + wider * (worst["ci_high"] - worst["value"])
    down = best["value"] - wider * (best["value"] - best["ci_low"])
    if up >= down:
        ends = f"{worst['value']:.3f} to {best['value']:.3f}"
        return [f"no hospital stands out: mean AUROC {ends}, no further apart than by chance."]
    return [
        f"the {worst['arm']} model is worst on the films of {worst['test_set']}: mean AUROC"
        f" {with_interval(worst)} over {worst['positives']} findings on {worst['n']:,} films,"
        f" against {with_interval(best)} at {best['test_set']}; the intervals lie apart, also"
        f" when widened for a choice among {len(rows)} hospitals."
    ]


def _limits_in_words(result: tables.Evaluation, means: pd.DataFrame, source: str) -> str:
    """Say what limits all this: where the labels come from, and how few films there are."""
    known = {
        "phantom": "these films are drawn, not taken: nothing here is evidence about patients",
        "own": "labels are those of your own table",
    }
    mined = "labels were mined from reports by text, and chest drains give Pneumothorax away"
    labels = known.get(source.split()[0], mined)
    rows = tables.over_seeds(result.metrics).drop_duplicates("finding").set_index("finding")
    without = []
    for row in rows.loc[[name for name in FINDINGS if name not in result.mean_over]].itertuples():
        why = f"fewer than {LEAST_PATIENTS} test patients with it, or without"
        few = 0 < row.positives < row.n
        without.append(f"{row.Index} ({why if few else undefined(row.positives, row.n)})")
    few = f"the mean leaves out {', '.join(without)}"
    films = f"{tables.over_seeds(means)['n'].max():,} test films"
    return f"limits: {labels}; {films}; {few if without else 'the mean is over all findings'}."


def too_small(result: tables.Evaluation, labels: pd.DataFrame) -> str:
    """Say that the test films of this index are too few, and how many would do; else nothing."""
    if result.mean_over:
        return ""
    truth, owners = tables.truth_of(labels), labels["patient_id"].to_numpy()
    fewer = np.minimum(*count_patients(truth, owners))  # of those with a finding, and without
    best, count = int(fewer.argmax()), len(np.unique(owners))
    text = (
        f"The test set is too small to judge anything: no finding has {LEAST_PATIENTS} test"
        f" patients with it and {LEAST_PATIENTS} without, of {count}."
    )
    if not fewer[best]:
        return (
            f"{text} Of every finding the known labels are all alike, or there are none: more films"
            " of this kind would not help."
        )
    wanted = -(-LEAST_PATIENTS * count // fewer[best])
    return f"{text} About {wanted} test patients would do for {FINDINGS[best]} alone."


def privacy_words(settings: Parameters) -> list[str]:
    """Say in sentences what a run promises its patients, from `privacy.csv` of the run."""
    table = read_budget(settings.run)
    if not len(table) and settings.dp != "off":
        raise InputError(f"{settings.run}/privacy.csv is missing: nothing is known of its epsilon")
    if not len(table):
        return ["No differential privacy: films stayed with their client, but updates can leak."]
    worst = table.loc[table.groupby(tables.OWNER, sort=False)["epsilon"].idxmax()]
    models = [
        f"{_name(row.arm, row.seed, row.client)}: epsilon {row.epsilon:.2f} at delta {row.delta:g}"
        f" after {row.steps} steps of {row.hospital} ({row.patients:,} patients, sampling rate"
        f" {row.sampling_rate:.3g}, noise multiplier {row.noise_multiplier:.3g}, clip"
        f" {row.clip:g})."
        for row in worst.itertuples()
    ]
    last = table.groupby("hospital", sort=False)["total_epsilon"].max()
    models.append(
        "Over all that this work folder had released of their patients when the run ended (its"
        " ledger adds arms, seeds, sweeps and searches up), epsilon was "
        + ", ".join(f"{total:.2f} at {hospital}" for hospital, total in last.items())
        + (", since models without privacy learned from them, too" if np.isinf(last).any() else "")
        + ". Later runs in the same folder, and releases elsewhere, come on top."
    )
    promise = (
        "Differential privacy of each training patient, all films together, against anyone who sees"
        " every update of every round (DP-SGD in each hospital, Rényi accountant, neighbours differ"
        " by one patient). Not protected: patients of the validation and test splits, whatever was"
        " chosen by their films (the round that is kept, a learning rate), and how many patients"
        " each hospital has."
    )
    noise = "The noise came from the system's randomness."
    if not settings.secure:
        noise = (
            "The noise was drawn from a seed: a simulation, since who knows the seed can take it"
            " off. A hospital would run secure=true."
        )
    return [promise, *models, noise]


def _name(arm: str, seed: object, client: str) -> str:
    """Name a model in a sentence."""
    return f"{' '.join(filter(None, [arm, str(client)]))} (seed {seed})"


def pointing_words(table: pd.DataFrame, image_size: int) -> str:
    """Say in plain sentences what pointing.csv shows, or why there is nothing to show."""
    if image_size < explain.LEAST_SIZE:
        grid = -(-image_size // 32)
        return (
            f"Where the model looks: {explain.NOT_MEASURABLE}. A film of {image_size} pixels has"
            f" {grid} x {grid} cells in {explain.LAYER}; {explain.LEAST_SIZE} pixels are the least."
        )
    if table.empty:
        return "Where the model looks: no film of the test set has a box."
    rows = table[table["finding"] == explain.ALL_BOXES].set_index("method")
    fixed = rows.loc[[explain.CENTRE, explain.ELSEWHERE]]
    best = fixed.loc[fixed["value"].idxmax()]
    lines = []
    for row in rows.loc[[explain.BY_MODEL]].itertuples():
        where = "above" if row.ci_low > best["ci_high"] else "not clear of"
        where = "below" if row.ci_high < best["ci_low"] else where
        lines.append(
            f"The hottest point of {row.arm} lies in a box in {tables.tally_words(row)}:"
            f" {where} the better of the two."
        )
    centre, elsewhere = (tables.tally_words(row) for row in fixed.itertuples())
    return (
        f"Without a look at any film, the {explain.CENTRE} lies in a box in {centre}, the"
        f" {explain.ELSEWHERE}, in {elsewhere}. {' '.join(lines)}"
    )


def membership_words(table: pd.DataFrame) -> list[str]:
    """Say of each model, in a sentence, what the attack found."""
    lines = []
    for owner, rows in table.groupby(tables.OWNER):
        rows, name = rows.set_index("metric"), _name(*owner)
        area, rate = rows.loc["auroc"], rows.loc[membership.RATE]
        members, others = area.members, area.non_members
        if np.isnan(area.ci_low):
            lines.append(f"{name}: not judged, {members} members and {others} others are too few.")
            continue
        found = "members have the lower loss" if area.ci_low > 0.5 else "no better than guessing"
        found = "members even have the higher loss" if area.ci_high < 0.5 else found
        stated = f"a rate at 1 % false positives needs {membership.FEWEST} others"
        if not np.isnan(rate.value):
            ends = f"{rate.ci_low:.1%} to {rate.ci_high:.1%}"
            stated = f"finds {rate.value:.1%} ({ends}) of them at 1 % false positives"
        lines.append(
            f"{name}: AUC {with_interval(area)}, {found}; {stated} ({members:,} members,"
            f" {others:,} others)."
        )
    return lines
