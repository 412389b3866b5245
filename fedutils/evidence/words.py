"""Sentences that are computed from tables: what they say stands in words.j2."""

import math
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import findings_of
from ..base.parameters import Parameters
from ..base.scores import undefined
from ..base.text import templates
from . import explain, membership, tables
from .intervals import Z
from .metrics import count_patients
from .tables import ALL_FILMS, LEAST_PATIENTS, MEAN, MEAN_LOCAL, ONE_SEED, SHOWN, with_interval

NAMED = " (95 % interval {} to {})"
TEMPLATES = templates(__file__)
TEMPLATES.tests["unknown"] = np.isnan
TEMPLATES.filters |= {"ends": partial(with_interval, form=NAMED), "brief": with_interval}
TEMPLATES.filters["tally"] = tables.tally_words
TEMPLATES.globals |= {"LEAST_PATIENTS": LEAST_PATIENTS, "ONE_SEED": ONE_SEED, "SHOWN": SHOWN}
TEMPLATES.globals |= {"inf": math.inf, "span": tables.span}


def say(sentence: str, **facts: Any) -> str:
    """Write a sentence of words.j2 with these facts, in one line."""
    template = TEMPLATES.get_template("words.j2").module
    return " ".join(getattr(template, sentence)(**facts).split())


def headline(result: tables.Evaluation, source: str, labels: str) -> list[str]:
    """Say in plain sentences what the tables show; each begins with the source of the films.

    `labels` says how the labels came about.
    """
    means = tables.mean_auroc_rows(result.metrics)
    whole = tables.rows_of(means, client="", test_set=ALL_FILMS)
    by_seed = whole[whole["seed"] != ""].groupby("arm")["value"]
    arms = whole[whole["seed"] == ""].itertuples()
    lines = [say("arm", row=row, seeds=by_seed.get_group(row.arm)) for row in arms]
    lines += _differences_in_words(result.differences, list(means["arm"].unique()))
    lines += _hospitals_in_words(means)
    rows = tables.over_seeds(result.metrics).drop_duplicates("finding").set_index("finding")
    rows = rows.drop([MEAN, *result.mean_over])
    few = rows["positives"].between(0, rows["n"], inclusive="neither")
    why = [undefined(row.positives, row.n) for row in rows.itertuples()]
    why = np.where(few, f"fewer than {LEAST_PATIENTS} test patients with it, or without", why)
    without = {reason: list(own.index) for reason, own in rows.groupby(why, sort=False)}
    films = tables.over_seeds(means)["n"].max()
    lines.append(say("limits", labels=labels, films=films, without=without))
    return [f"{source}: {line}" for line in lines]


def _differences_in_words(differences: pd.DataFrame, arms: list[str]) -> list[str]:
    """Say which arm wins, by how much, and whether that is shown."""
    if differences.empty:
        return [say("no_difference", arms=arms)]
    whole = tables.rows_of(differences, test_set=ALL_FILMS, metric="auroc")
    whole = whole.assign(judged=whole["verdict"].isin([SHOWN, tables.NOT_SHOWN]))
    single, lines = ~whole["second"].isin(["centralised", MEAN_LOCAL]), []
    for second, rows in whole[~single].groupby("second", sort=False):
        rows, model = rows.set_index("finding"), f"the {second.removesuffix(' model')} model"
        own = rows.drop(MEAN).query("judged")
        value = own.loc[own["verdict"] == SHOWN, "value"]
        findings = {"above": value.index[value > 0], "below": value.index[value < 0]}
        facts = {"model": model, "mean": rows.loc[MEAN], "judged": len(own)}
        lines.append(say("difference", **facts, findings=findings))
    means = whole[single & (whole["finding"] == MEAN)].query("judged")
    shown = means.loc[means["verdict"] == SHOWN, "value"]
    if len(means):
        counts = {"above": (shown > 0).sum(), "below": (shown < 0).sum(), "judged": len(means)}
        lines.append(say("local_models", **counts))
    return lines


def _hospitals_in_words(means: pd.DataFrame) -> list[str]:
    """Name the hospital on whose test films the first arm is worst, if it stands out."""
    rows = tables.hospitals(means, means["arm"].iloc[0]).dropna(subset=["value", "ci_low"])
    if len(rows) < 2:
        return []
    if rows["on_all_films"].nunique() > 1:  # the means are over findings of their own
        return [say("different_hospitals", rows=list(rows.itertuples()))]
    worst, best = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
    # The extremes of many lie apart by chance: wider for the number of pairs (Bonferroni).
    wider = NormalDist().inv_cdf(1 - 0.025 / math.comb(len(rows), 2)) / Z
    up = worst["value"] + wider * (worst["ci_high"] - worst["value"])
    down = best["value"] - wider * (best["value"] - best["ci_low"])
    return [say("hospitals", worst=worst, best=best, apart=up < down, count=len(rows))]


def too_small(result: tables.Evaluation, labels: pd.DataFrame) -> str:
    """Say that the test films of this index are too few, and how many would do; else nothing."""
    if result.mean_over:
        return ""
    truth, owners = tables.truth_of(labels), labels["patient_id"].to_numpy()
    fewer = np.minimum(*count_patients(truth, owners))  # of those with a finding, and without
    best, count = int(fewer.argmax()), len(np.unique(owners))
    wanted = -(-LEAST_PATIENTS * count // fewer[best]) if fewer[best] else 0
    return say("too_small", patients=count, finding=findings_of(labels)[best], wanted=wanted)


def control_words(controls: pd.DataFrame, metrics: pd.DataFrame) -> str:
    """Say what age, sex, view and scanner alone reach, and shuffled labels, beside the models."""
    rows = tables.rows_of(tables.mean_auroc_rows(tables.over_seeds(metrics)), client="")
    return say("controls", mean=controls.loc[MEAN], models=list(rows.itertuples()))


def privacy_words(settings: Parameters) -> list[str]:
    """Say in sentences what a run promises its patients, from `privacy.csv` of the run."""
    table = tables.read_budget(settings.run)
    if not len(table) and settings.dp != "off":
        raise InputError(f"{settings.run}/privacy.csv is missing: nothing is known of its epsilon")
    if not len(table):
        return [say("no_privacy")]
    worst = table.loc[table.groupby(tables.OWNER, sort=False)["epsilon"].idxmax()]
    totals = table.groupby("hospital", sort=False)["total_epsilon"].max()
    spent = [say("spent", row=row) for row in worst.itertuples()]
    noise = say("noise", secure=settings.secure)
    return [say("privacy"), *spent, say("spent_in_all", totals=totals), noise]


def pointing_words(table: pd.DataFrame, image_size: int) -> str:
    """Say in plain sentences what pointing.csv shows, or why there is nothing to show."""
    if image_size < explain.LEAST_SIZE or table.empty:
        facts = {"least": explain.LEAST_SIZE, "layer": explain.LAYER}
        return say("no_pointing", image_size=image_size, why=explain.NOT_MEASURABLE, **facts)
    rows = table[table["finding"] == explain.ALL_BOXES].set_index("method")
    centre, elsewhere = rows.loc[[explain.CENTRE, explain.ELSEWHERE]].itertuples()
    best = max(centre, elsewhere, key=lambda row: row.value)
    models = rows.loc[[explain.BY_MODEL]].itertuples()
    return say("pointing", centre=centre, elsewhere=elsewhere, models=models, best=best)


def membership_words(table: pd.DataFrame) -> list[str]:
    """Say of each model, in a sentence, what the attack found."""
    lines = []
    for owner, rows in table.groupby(tables.OWNER):
        area, rate = (rows.set_index("metric").loc[name] for name in ("auroc", membership.RATE))
        facts = {"name": owner, "area": area, "rate": rate, "fewest": membership.FEWEST}
        lines.append(say("membership", **facts))
    return lines
