"""Sentences that are computed from tables."""

import numpy as np
import pandas as pd

from ..base.findings import FINDINGS
from ..base.parameters import Parameters
from ..base.scores import undefined
from ..run import read_budget
from .explain import ALL_BOXES, BY_MODEL, CENTRE, ELSEWHERE, LAYER, LEAST_SIZE, NOT_MEASURABLE
from .membership import FEWEST, RATE
from .tables import (
    ALL_FILMS,
    LEAST_PATIENTS,
    MEAN,
    MEAN_LOCAL,
    NOT_SHOWN,
    ONE_SEED,
    OWNER,
    SHOWN,
    Evaluation,
    hospitals,
    mean_auroc_rows,
    over_seeds,
    rows_of,
    span,
    tally_words,
    with_interval,
)

NAMED = " (95 % interval {} to {})"
VERDICTS = [SHOWN, NOT_SHOWN]


def headline(result: Evaluation, source: str) -> list[str]:
    """Say in plain sentences what the tables show; each begins with the source of the films."""
    means = mean_auroc_rows(result.metrics)
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
        same = rows_of(means, arm=row.arm, client="", test_set=ALL_FILMS)
        seeds = same[same["seed"] != ""]["value"]
        spread = span(seeds.min(), seeds.max(), "")
        of = f"mean of {len(seeds)} seeds, {spread}" if len(seeds) > 1 else "one training seed"
        name = f"the {MEAN_LOCAL}" if row.arm == "local" else row.arm
        if np.isnan(row.value):
            lines.append(f"{name} has no mean AUROC: too few test patients.")
            continue
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
    whole = rows_of(differences, test_set=ALL_FILMS, metric="auroc")
    lines = []
    for second, rows in whole.groupby("second", sort=False):
        if second in ("centralised", MEAN_LOCAL):
            lines.append(_one_difference(second, rows.set_index("finding")))
    means = whole[(whole["finding"] == MEAN) & ~whole["second"].isin(["centralised", MEAN_LOCAL])]
    means = means[means["verdict"].isin(VERDICTS)]
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
        return f"federated against {second}: not defined, for want of test patients."
    if mean["verdict"] == ONE_SEED:
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
    """Name the hospital on whose test films the first arm is worst, if it stands out."""
    rows = hospitals(means, means["arm"].iloc[0]).dropna(subset=["value", "ci_low"])
    if len(rows) < 2:
        return []
    worst, best = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
    if worst["ci_high"] >= best["ci_low"]:
        ends = f"{worst['value']:.3f} to {best['value']:.3f}"
        return [f"no hospital stands out: mean AUROC {ends}, and the intervals overlap."]
    return [
        f"the {worst['arm']} model is worst on the films of {worst['test_set']}: mean AUROC"
        f" {with_interval(worst)} over {worst['positives']} findings on {worst['n']:,} films,"
        f" against {with_interval(best)} at {best['test_set']}; the intervals lie apart."
    ]


def _limits_in_words(result: Evaluation, means: pd.DataFrame, source: str) -> str:
    """Say what limits all this: where the labels come from, and how few films there are."""
    known = {
        "phantom": "these films are drawn, not taken: nothing here is evidence about patients",
        "own": "labels are those of your own table",
    }
    mined = "labels were mined from reports by text, and chest drains give Pneumothorax away"
    labels = known.get(source.split()[0], mined)
    rows = over_seeds(result.metrics).drop_duplicates("finding").set_index("finding")
    without = [
        f"{finding} ({_why_left_out(rows.loc[finding])})"
        for finding in FINDINGS
        if finding not in result.mean_over
    ]
    few = f"the mean leaves out {', '.join(without)}"
    films = f"{over_seeds(means)['n'].max():,} test films"
    return f"limits: {labels}; {films}; {few if without else 'the mean is over all findings'}."


def _why_left_out(row: pd.Series) -> str:
    """Say why a finding is not in the mean."""
    if 0 < row["positives"] < row["n"]:
        return f"fewer than {LEAST_PATIENTS} test patients with it, or without"
    return undefined(row["positives"], row["n"])


def too_small(result: Evaluation, labels: pd.DataFrame) -> str:
    """Say that the test set is too small, and which size would do; empty where it is not.

    `labels` is the index of the test films.
    """
    if result.mean_over:
        return ""
    by_patient = labels.groupby("patient_id")[list(FINDINGS)].max()
    counts = by_patient.sum()
    positive, count = int(counts.max()), len(by_patient)
    text = (
        f"The test set is too small to judge anything: no finding has {LEAST_PATIENTS} test"
        f" patients with it and {LEAST_PATIENTS} without, of {count}."
    )
    if not positive:
        return f"{text} No test patient is known to have any of the findings."
    wanted = -(-LEAST_PATIENTS * count // min(positive, max(1, count - positive)))
    return f"{text} About {wanted} test patients would do for {counts.idxmax()} alone."


def privacy_words(settings: Parameters) -> list[str]:
    """Say in sentences what a run promises its patients, from `privacy.csv` of the run."""
    table = read_budget(settings.run)
    if not len(table):
        return ["No differential privacy: films stayed with their client, but updates can leak."]
    worst = table.loc[table.groupby(OWNER, sort=False)["epsilon"].idxmax()]
    models = [
        f"{_name(row.arm, row.seed, row.client)}: epsilon {row.epsilon:.2f} at delta {row.delta:g}"
        f" after {row.steps} steps of {row.hospital} ({row.patients:,} patients, sampling rate"
        f" {row.sampling_rate:.3g}, noise multiplier {row.noise_multiplier:.3g}, clip"
        f" {row.clip:g})."
        for row in worst.itertuples()
    ]
    promise = (
        "Differential privacy of each training patient, all films together, against anyone who sees"
        " every update of every round (DP-SGD in each hospital, Rényi accountant, neighbours differ"
        " by one patient). Patients of the validation and test splits are not protected."
    )
    noise = (
        "The noise came from the system's randomness."
        if settings.secure
        else "The noise was drawn from a seed: a simulation, since who knows the seed can take it"
        " off. A hospital would run secure=true."
    )
    return [promise, *models, noise]


def _name(arm: str, seed: object, client: str) -> str:
    """Name a model in a sentence."""
    return f"{' '.join(filter(None, [arm, str(client)]))} (seed {seed})"


def pointing_words(table: pd.DataFrame, image_size: int) -> str:
    """Say in plain sentences what pointing.csv shows, or why there is nothing to show."""
    if image_size < LEAST_SIZE:
        grid = -(-image_size // 32)
        return (
            f"Where the model looks: {NOT_MEASURABLE}. A film of {image_size} pixels has {grid} x"
            f" {grid} cells in {LAYER}; {LEAST_SIZE} pixels are the least."
        )
    if table.empty:
        return "Where the model looks: no film of the test set has a box."
    rows = table[table["finding"] == ALL_BOXES].set_index("method")
    fixed = rows.loc[[CENTRE, ELSEWHERE]]
    best = fixed.loc[fixed["value"].idxmax()]
    lines = []
    for row in rows.loc[[BY_MODEL]].itertuples():
        where = "above" if row.ci_low > best["ci_high"] else "not clear of"
        where = "below" if row.ci_high < best["ci_low"] else where
        lines.append(
            f"The hottest point of {row.arm} lies in a box in {tally_words(row)}: {where} the"
            " better of the two."
        )
    centre, elsewhere = (tally_words(row) for row in fixed.itertuples())
    positions = f"the {CENTRE} lies in a box in {centre}, the {ELSEWHERE}, in {elsewhere}"
    return f"Without a look at any film, {positions}. {' '.join(lines)}"


def membership_words(table: pd.DataFrame) -> list[str]:
    """Say of each model, in a sentence, what the attack found."""
    wide = table.pivot(index=OWNER, columns="metric")
    return [_attack_sentence(owner, row) for owner, row in wide.iterrows()]


def _attack_sentence(owner: tuple, row: pd.Series) -> str:
    """Say what the attack found of one model."""
    name, area, rate = _name(*owner), row.xs("auroc", level=1), row.xs(RATE, level=1)
    members, others = int(area.members), int(area.non_members)
    if np.isnan(area.ci_low):
        return f"{name}: not judged, {members} members and {others} others are too few."
    found = "members even have the higher loss" if area.ci_high < 0.5 else "no better than guessing"
    found = "members have the lower loss" if area.ci_low > 0.5 else found
    low, high = f"{rate.ci_low:.1%}", f"{rate.ci_high:.1%}"
    stated = f"finds {rate.value:.1%} ({low} to {high}) of them at 1 % false positives"
    if np.isnan(rate.value):
        stated = f"a rate at 1 % false positives needs {FEWEST} others"
    return (
        f"{name}: AUC {with_interval(area)}, {found}; {stated} ({members:,} members, {others:,}"
        " others)."
    )
