"""Findings: exact label parsing, and the way back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedutils.base.errors import InputError
from fedutils.base.findings import FINDINGS, canonical, format_labels, parse_labels


@given(st.sets(st.sampled_from(FINDINGS)))
def test_a_label_string_survives_the_round_trip(findings):
    text = "|".join(findings) or "No Finding"
    vector = parse_labels(text)
    assert vector.shape == (14,) and vector.sum() == len(findings)
    assert set(format_labels(vector).split("|")) == (findings or {"No Finding"})
    assert np.array_equal(parse_labels(format_labels(vector)), vector)


def test_spellings_that_nih_uses_are_known():
    assert canonical("Infiltrate") == "Infiltration"
    assert parse_labels("No_Finding").sum() == 0
    assert len(FINDINGS) == len(set(FINDINGS)) == 14


@pytest.mark.parametrize(
    "text", ["Pleural_thickening", "", "Effusion|", "effusion", "Mass | Nodule"]
)
def test_an_unknown_finding_is_an_error_that_names_it(text):
    with pytest.raises(InputError, match="unknown finding"):
        parse_labels(text)


def test_no_finding_beside_a_finding_is_an_error():
    with pytest.raises(InputError, match="stands beside a finding"):
        parse_labels("No Finding|Mass")
