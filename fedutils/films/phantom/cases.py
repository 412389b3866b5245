"""Who is in the phantom: patients, scanners, films and findings, by quota."""

import tomllib
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ...base.errors import InputError
from ...base.findings import format_labels
from ...base.rng import generator

DEFAULT_PATIENTS = 1200
DEFAULT_SIZE = 192  # pixels
CASES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
Scanner = namedtuple("Scanner", CASES["scanner"][0])
SCANNERS = tuple(Scanner(**about) for about in CASES["scanner"])
FINDINGS = tuple(CASES["finding"])  # in NIH's order
NIH_SHARE = {name: about["share"] for name, about in CASES["finding"].items()}
SHARE_FLOOR, TEST_SHARE, TEST_PATIENTS = 0.06, 0.32, 45


def phantom_table(patients: int = DEFAULT_PATIENTS, seed: int = 0) -> pd.DataFrame:
    """Return one row a film, in NIH's order and with NIH's columns, plus `scanner` and `split`.

    `scanner` indexes SCANNERS; `split` is train_val or test, by patient. Counts of findings are
    quotas, not chance: NIH's order of prevalence, and TEST_PATIENTS positive test patients each
    as soon as the set is large enough. Raises InputError for fewer than 20 patients.
    """
    if patients < 20:
        raise InputError(f"patients={patients}: the phantom needs at least 20")
    films = _films(_patients(patients, generator(seed, "patients")), generator(seed, "films"))
    labels = np.zeros((len(films), len(FINDINGS)), dtype=np.uint8)
    for split in ("train_val", "test"):
        rows = np.flatnonzero(films["split"] == split)
        labels[rows] = _findings(films.iloc[rows], generator(seed, f"findings {split}"))
    films.insert(
        1,
        "Finding Labels",
        [format_labels(dict(zip(FINDINGS, row, strict=True))) for row in labels],
    )
    return films


def _patients(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw who is in the set: main scanner, number of films (few have many), sex, age, split."""
    rank = (np.arange(count) + 0.5) / count
    shares = np.cumsum([scanner.patients for scanner in SCANNERS])
    scanner = np.searchsorted(shares, rng.permutation(rank)).clip(max=len(SCANNERS) - 1)
    busy = rng.gumbel(size=count) + np.log([1.0, 1.7, 1.7, 1.0, 0.8])[scanner]
    order = np.argsort(np.argsort(busy))
    films = np.floor((1 - rank) ** (-1 / 1.5)).clip(1, 12).astype(int)[order]
    test = np.diff(np.floor(np.arange(count + 1) * TEST_SHARE + 0.5))[order] > 0
    return pd.DataFrame({
        "Patient ID": np.arange(1, count + 1),
        "films": films,
        "scanner": scanner,
        "Patient Gender": np.where(rng.random(count) < 0.565, "M", "F"),
        "Patient Age": rng.normal(47, 16, count).clip(2, 92).astype(int),
        "split": np.where(test, "test", "train_val"),
    })  # fmt: skip


def _films(people: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Draw each patient's films in NIH's columns; one in twelve comes from another scanner."""
    rows = people.loc[people.index.repeat(people["films"])].reset_index(drop=True)
    follow_up = rows.groupby("Patient ID").cumcount()
    other = rng.choice(len(SCANNERS), len(rows), p=[scanner.patients for scanner in SCANNERS])
    rows["scanner"] = rows["scanner"].where(rng.random(len(rows)) > 1 / 12, other)
    looks = pd.DataFrame(SCANNERS).iloc[rows["scanner"]].reset_index(drop=True)
    names = [f"{p:08d}_{f:03d}.png" for p, f in zip(rows["Patient ID"], follow_up, strict=True)]
    rows.insert(0, "Image Index", names)
    rows["Follow-up #"] = follow_up
    rows["Patient Age"] += follow_up // 3
    rows.loc[len(rows) // 2, "Patient Age"] = 411  # NIH's table has such typing errors
    rows["View Position"] = np.where(rng.random(len(rows)) < looks["ap"], "AP", "PA")
    rows["Width"], rows["Height"] = looks["width"], looks["height"]
    rare = (looks["spacing"] > 0.19) & (rng.random(len(rows)) < 0.1)
    rows["Spacing"] = looks["spacing"].mask(rare, 0.193754)
    return rows.drop(columns="films")


def _findings(films: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Give the films of one split their findings by quota; uint8 of shape (films, 14)."""
    scanner = films["scanner"].to_numpy()
    portable = (films["View Position"] == "AP").to_numpy()
    clear = np.array([look.clear for look in SCANNERS])[scanner]
    order = np.argsort(rng.gumbel(size=len(films)) + np.log(clear / (1 - clear)))
    healthy = np.isin(np.arange(len(films)), order[round(0.75 * len(films)) :])
    labels = np.zeros((len(films), len(FINDINGS)), dtype=np.uint8)
    for finding in sorted(FINDINGS, key=lambda name: -NIH_SHARE[name]):
        about = CASES["finding"][finding]
        mix = np.log(about["scanners"])
        score = rng.gumbel(size=len(films)) + mix[scanner] + np.log(about["portable"]) * portable
        for earlier, lift in about.get("together", {}).items():
            score += np.log(lift) * labels[:, FINDINGS.index(earlier)]
        score[healthy] = -np.inf
        score -= 0.5 * labels.sum(axis=1)  # few films have more than three
        quota = max(1, round((SHARE_FLOOR + NIH_SHARE[finding] / 2) * len(films)))
        chosen = _choose(score, films["Patient ID"].to_numpy(), quota)
        labels[chosen, FINDINGS.index(finding)] = 1
    return labels


def _choose(score: np.ndarray, patient: np.ndarray, quota: int) -> np.ndarray:
    """Return `quota` films of high score: one film of each patient first, then others of theirs."""
    order = np.argsort(-score, kind="stable")
    order = order[np.isfinite(score[order])]
    enough = max(round(0.75 * quota), min(quota, TEST_PATIENTS))
    first = order[~pd.Series(patient[order]).duplicated().to_numpy()][:enough]
    theirs = order[np.isin(patient[order], patient[first]) & ~np.isin(order, first)]
    return np.concatenate([first, theirs[: quota - enough]])


class Film(NamedTuple):
    """What is drawn on one film: who, how, on which scanner, and with which findings."""

    patient: int
    follow_up: int = 0
    sex: str = "M"
    view: str = "PA"
    scanner: int = 0
    findings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file name, in NIH's form."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


def to_films(table: pd.DataFrame) -> list[Film]:
    """Turn the rows of a phantom's table into films to draw."""
    columns = ["Patient ID", "Follow-up #", "Patient Gender", "View Position", "scanner"]
    labels = [
        tuple(f for f in text.split("|") if f in FINDINGS) for text in table["Finding Labels"]
    ]
    rows = table[columns].itertuples(index=False)
    return [Film(*row, label) for row, label in zip(rows, labels, strict=True)]
