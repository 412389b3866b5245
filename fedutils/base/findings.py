"""The 14 findings of NIH ChestX-ray14 in canonical order, and label strings to vectors and back.

Source: Wang et al., "ChestX-ray8", CVPR 2017, table 1, and the data set's own README.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .errors import InputError

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia",
)  # fmt: skip
NO_FINDING = "No Finding"
# Other spellings that NIH's own files use: the box list and some mirrors.
ALIASES = {"Infiltrate": "Infiltration", "No_Finding": NO_FINDING}


def canonical(finding: str) -> str:
    """Return the canonical spelling of one finding; raise InputError if it is unknown."""
    name = ALIASES.get(finding, finding)
    if name not in FINDINGS and name != NO_FINDING:
        raise InputError(f"unknown finding {finding!r}; known: {', '.join(FINDINGS)}, {NO_FINDING}")
    return name


def parse_labels(text: str) -> np.ndarray:
    """Turn 'Effusion|Mass' into a uint8 vector of shape (14,); 'No Finding' is all zeros.

    Raises InputError on an unknown finding, and on 'No Finding' beside a finding.
    """
    names = [canonical(part) for part in text.split("|")]
    if NO_FINDING in names and len(names) > 1:
        raise InputError(f"{NO_FINDING!r} stands beside a finding in {text!r}")
    return np.array([finding in names for finding in FINDINGS], dtype=np.uint8)


def format_labels(vector: Iterable[float]) -> str:
    """Turn 14 zeros and ones into NIH's label string; with NaN it says how many are known."""
    values = np.array(list(vector), dtype=float)
    names = [finding for finding, present in zip(FINDINGS, values, strict=True) if present == 1]
    known = np.count_nonzero(~np.isnan(values))
    none = NO_FINDING if known == len(FINDINGS) else f"none of {known} known"
    return "|".join(names) or (none if known else "not labelled")


def no_finding(labels: pd.DataFrame) -> pd.Series:
    """Tell which films show none of the findings: 1 or 0 a row, NaN where a gap leaves it open.

    `labels` has the columns of FINDINGS with 0, 1 or NaN. A finding that nobody looked for on any
    film is left aside; a row's own gap beside zeros is not.
    """
    known = labels.loc[:, labels.notna().any()]
    absent = (known == 0).all(axis=1) & (known.shape[1] > 0)
    return absent.astype(float).where(absent | (known == 1).any(axis=1))


SPLITS = ("train", "val", "test")
