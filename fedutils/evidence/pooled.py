"""A test over hospitals: what each counts of its own films, and all tables from their sums.

In three steps, since what is counted in one depends on the one before. `span_sums` tell between
which logits scores lie, `grid_sums` count films on a grid of them: of these come values, cuts, and
what scores are joined for the bootstrap (`Plan`). `draw_sums` count resamples, errors and rates by
that plan. All are whole numbers (int64), which add up in any order and under masks. Resamples are
drawn from each patient's id, so that the tables are those of notebook 04 from the same films in one
place, but for ties on the grid and roundings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..base.scores import (
    COARSE_STEPS,
    FINE_STEPS,
    cell_of,
    count_coarse,
    edge_of,
    logit_of,
    span_of,
)
from . import tables
from .bootstrap import SEGMENTS, areas, around, count_segments, join_scores, patient_resamples
from .calibration import (
    BINS,
    error_sums,
    fit_recalibration,
    recalibration_ends,
    spreads,
    tabulate_errors,
)
from .cuts import CUTS, choose_cut, rate_sums, tabulate_rates, threshold_of
from .differences import DIFFERENCES
from .metrics import REPEATS, Counts, add_means, count_patients, tabulate_models, with_mean
from .tables import ALL_FILMS, METRICS, OWNER, RATES

UNITS = 1 << 20  # of a number that is none of films: squares, gaps, products of scores
Sums = dict[str, np.ndarray]
Spans = list[tuple[float, float]]  # of each finding


@dataclass(frozen=True)
class Plan:
    """What is counted in the third step, by finding: plain numbers that a message can hold."""

    spans: Spans  # of the grids of scores
    ends: list[list[int]]  # the first cell of each segment of scores, falling
    cuts: list[list[int]]  # the cell of each rule's cut; -1: none
    weights: list[list[list[float]]]  # of the two fits of the recalibration


def span_shapes(findings: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `span_sums`."""
    return {"coarse": (findings, COARSE_STEPS)}


def span_sums(truth: np.ndarray, chance: np.ndarray, patients: np.ndarray) -> Sums:
    """Count films for validation, by finding those with a label, on coarse steps of the score.

    Labels and probabilities are (n, findings), `patients` (n,).
    """
    known = [p[~np.isnan(y)] for y, p in zip(truth.T, chance.T, strict=True)]
    return {"coarse": np.array([count_coarse(p) for p in known], np.int64)}


def spans_of(sums: Sums) -> Spans:
    """Return the spans of each finding's grid, by the sums of the first step."""
    return [span_of(coarse) for coarse in sums["coarse"]]


def grid_shapes(findings: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `grid_sums`."""
    counts = {"val": (2, findings, FINE_STEPS), "test": (2, findings, FINE_STEPS)}
    return counts | {"patients": (2, findings), "films": (2,), "taught": (findings,)}


def grid_sums(
    taught: np.ndarray, val: tuple[np.ndarray, ...], test: tuple[np.ndarray, ...], spans: Spans
) -> Sums:
    """Count films with and without each finding on the grid of scores: (2, findings, FINE_STEPS).

    `taught` are the labels of training (n, findings), `val` and `test` labels, probabilities (n,
    findings) and patients (n,). `patients` counts those with a positive film, and with a negative
    one, `films` test films and their patients, `taught` known labels.
    """
    found = {}
    for name, (truth, chance, _) in (("val", val), ("test", test)):
        cells = _cells(chance, spans)
        place = np.arange(truth.shape[1]) * FINE_STEPS + cells  # by finding, then cell
        size = truth.shape[1] * FINE_STEPS
        counts = [np.bincount(place[truth == mark], minlength=size) for mark in (1, 0)]
        found[name] = np.reshape(counts, (2, -1, FINE_STEPS))
    truth, _, patients = test
    counts = {"patients": count_patients(truth, patients)}
    counts["films"] = [len(truth), len(np.unique(patients))]
    counts["taught"] = (~np.isnan(taught)).sum(axis=0)
    return found | {name: np.asarray(value, np.int64) for name, value in counts.items()}


def _cells(chance: np.ndarray, spans: Spans) -> np.ndarray:
    """Return on which cell of each finding's grid probabilities (n, findings) lie."""
    columns = [cell_of(p, span) for p, span in zip(chance.T, spans, strict=True)]
    return np.stack(columns, axis=1)


def counts_of(grid: Sums) -> Counts:
    """Return what is known of the test films."""
    positive, negative = grid["test"].sum(axis=2)
    return Counts(int(grid["films"][0]), positive + negative, positive, grid["patients"])


def _taught_only(sums: Sums, taught: np.ndarray) -> Sums:
    """Leave out the films' counts of a finding that no hospital was taught: nobody judges it."""
    axes = {"val": 1, "test": 1, "patients": 1, "films": None, "taught": None}
    kept = {}
    for name, value in sums.items():
        axis = axes.get(name, 0)
        shape = [len(taught) if k == axis else 1 for k in range(value.ndim)]
        kept[name] = value if axis is None else value * (taught > 0).reshape(shape)
    return kept


def plan_of(spans: Spans, grid: Sums) -> Plan:
    """Choose cuts by the films for validation, and what resamples and errors are counted by."""
    grid = _taught_only(grid, grid["taught"])
    segments = [join_scores(*pair[:, ::-1]) for pair in grid["test"].transpose(1, 0, 2)]
    ends = [np.flatnonzero(np.diff(segment, prepend=-1)).tolist() for segment in segments]
    weights = [[w.tolist() for w, _ in fits] for fits in _fits(spans, grid)]
    return Plan(spans, ends, _cuts(grid), weights)


def _cuts(grid: Sums) -> list[list[int]]:
    """Choose each finding's cuts by the films for validation, a cell a rule; -1: none."""
    return [[choose_cut(*pair, rule) for rule in CUTS] for pair in grid["val"].transpose(1, 0, 2)]


def _fits(spans: Spans, grid: Sums) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Fit the recalibration of each finding with patients enough; zeros of the others."""
    none = [(np.zeros(k), np.zeros((k, k))) for k in (2, 1)]
    fits = []
    for span, (positive, negative), judged in zip(
        spans, grid["test"].transpose(1, 0, 2), counts_of(grid).enough, strict=True
    ):
        filled = np.flatnonzero(positive + negative)
        films, logits = (positive + negative)[filled], logit_of(edge_of(filled, span, 0.5))
        fits.append(fit_recalibration(logits, films, positive[filled]) if judged else none)
    return fits


def draw_shapes(findings: int, repeats: int = REPEATS) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `draw_sums`."""
    draws = 1 + repeats
    return {
        "counts": (findings, 2, SEGMENTS, draws), "drawn": (findings, draws),
        "squares": (findings, draws), "gaps": (findings, BINS, draws), "chance": (findings, BINS),
        "slope": (findings, 2, 2), "intercept": (findings, 1, 1),
        "rates": (findings, len(CUTS), len(RATES), 6),
    }  # fmt: skip


def draw_sums(
    truth: np.ndarray, chance: np.ndarray, patients: np.ndarray, plan: Plan, seed: int,
    repeats: int = REPEATS,
) -> Sums:  # fmt: skip
    """Count the test films of one hospital as a plan says: whole numbers, shaped by `draw_shapes`.

    Labels and probabilities are (n, findings), `patients` (n,). Patients are drawn by `seed`.
    """
    found = {name: np.zeros(size) for name, size in draw_shapes(truth.shape[1], repeats).items()}
    if not len(truth):
        return {name: value.astype(np.int64) for name, value in found.items()}
    resamples = patient_resamples(patients, repeats, seed)
    cells = FINE_STEPS - 1 - _cells(chance, plan.spans)
    for k, ends in enumerate(plan.ends):
        known = ~np.isnan(truth[:, k])
        y, p, who = truth[known, k], chance[known, k], resamples.owner[known]
        segment = np.searchsorted(ends, cells[known, k], side="right") - 1
        counted = list(count_segments(segment, who, y, resamples))
        for mark, parts in enumerate(zip(*counted, strict=True)):
            whole = np.concatenate(parts, axis=1)
            found["counts"][k, mark, : len(whole)] = whole
        for name, value in error_sums(y, p, who, resamples).items():
            found[name][k] = value if name == "drawn" else value * UNITS
        weights = [np.array(one) for one in plan.weights[k]]
        inside = spreads(logit_of(p), y, who, weights)
        found["slope"][k], found["intercept"][k] = (UNITS * np.nan_to_num(one) for one in inside)
        for rule, cut in enumerate(plan.cuts[k]):
            called = FINE_STEPS - 1 - cells[known, k] >= cut
            found["rates"][k, rule] = [*rate_sums(y, called & (cut >= 0), who).values()]
    return {name: np.rint(value).astype(np.int64) for name, value in found.items()}


def pooled_draws(grid: Sums, sums: Sums) -> np.ndarray:
    """Return of each finding AUROC and average precision in every resample, as `bootstrap` does."""
    draws = []
    for whole, counted in zip(grid["test"].transpose(1, 0, 2), sums["counts"], strict=True):
        value = areas(*(part[::-1, None] for part in whole.astype(float)), METRICS)
        draws.append(around(value, areas(*counted.astype(float), METRICS)))
    return np.stack(draws, axis=1)


def pooled_tables(
    findings: Sequence[str], models: Mapping[tables.Owner, tuple[Spans, Sums, Sums]]
) -> tuple[tables.Evaluation, pd.DataFrame, pd.DataFrame]:
    """Return metrics (and no differences), calibration and operating points of all films together.

    `models` holds of each model the spans of its grids, and the sums over hospitals of the last
    two steps.
    """
    grid = next(iter(models.values()))[1]
    counts = counts_of(grid)
    chosen = {ALL_FILMS: np.flatnonzero(counts.enough).tolist()}
    positives, draws = grid["val"][0].sum(axis=1), {}
    models = {
        owner: (spans, _taught_only(one, grid["taught"]), _taught_only(two, grid["taught"]))
        for owner, (spans, one, two) in models.items()
    }
    for owner, (_, one, two) in models.items():
        draws[owner] = {ALL_FILMS: with_mean(pooled_draws(one, two), chosen[ALL_FILMS])}
    draws = add_means(draws, chosen)
    metrics = tabulate_models(findings, draws, {ALL_FILMS: counts}, chosen)
    mean_over = [findings[k] for k in chosen[ALL_FILMS]]
    errors, points = [], []
    for owner, (spans, grid, sums) in models.items():
        table = tabulate_errors(
            _errors(findings, spans, grid, sums), counts_of(grid).enough, counts.films
        )
        errors.append(tables.name_model(table.assign(hospital=""), owner))
        rates = pd.DataFrame(_rates(findings, spans, grid, sums, positives))
        points.append(tables.name_model(rates, owner))
    calibration = pd.concat(errors, ignore_index=True)
    order = [*OWNER, "hospital"]
    calibration = calibration[[*order, *(name for name in calibration if name not in order)]]
    evaluation = tables.Evaluation(metrics, pd.DataFrame(columns=DIFFERENCES), mean_over)
    return evaluation, calibration, pd.concat(points, ignore_index=True)


def _errors(findings: Sequence[str], spans: Spans, grid: Sums, sums: Sums) -> list[dict[str, Any]]:
    """Return what `tabulate_errors` wants of each finding."""
    counts, fits, rows = counts_of(grid), _fits(spans, grid), []
    for k, finding in enumerate(findings):
        row = {"finding": finding, "positives": int(counts.positives[k]), "drawn": sums["drawn"][k]}
        row |= {name: sums[name][k] / UNITS for name in ("squares", "gaps", "chance")}
        if counts.enough[k]:
            spread = [sums[name][k] / UNITS for name in ("slope", "intercept")]
            row |= recalibration_ends(fits[k], spread)
        rows.append(row)
    return rows


def _rates(
    findings: Sequence[str], spans: Spans, grid: Sums, sums: Sums, positives: np.ndarray
) -> list[dict[str, Any]]:
    """Return the operating points, a row a finding and rule; `positives` are on validation."""
    counts, cuts, rows = counts_of(grid), _cuts(grid), []
    for k, finding in enumerate(findings):
        for rule, name in enumerate(CUTS):
            threshold = threshold_of(cuts[k][rule], spans[k])
            row = {"finding": finding, "rule": name, "threshold": threshold}
            row |= {"val_positives": int(positives[k])}
            own = dict(zip(RATES, sums["rates"][k, rule], strict=True))
            films, positive = int(counts.known[k]), int(counts.positives[k])
            row |= tabulate_rates(own, threshold, counts.enough[k], films, positive)
            rows.append(row)
    return rows
