"""Findings: exact label parsing, and the way back."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedutils.base.errors import InputError
from fedutils.base.findings import choose_findings, findings_of, format_labels
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.read import canonical, parse_labels


@given(st.sets(st.sampled_from(FINDINGS)))
def test_a_label_string_survives_the_round_trip(findings):
    text = "|".join(findings) or "No Finding"
    vector = parse_labels(text)
    assert vector.shape == (14,) and vector.sum() == len(findings)
    said = format_labels(dict(zip(FINDINGS, vector, strict=True)))
    assert set(said.split("|")) == (findings or {"No Finding"})
    assert np.array_equal(parse_labels(said), vector)


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


def test_a_list_chooses_findings_in_the_datas_order_and_a_typing_error_is_named():
    assert choose_findings(["A", "B", "C"], "") == ["A", "B", "C"]
    assert choose_findings(["A", "B", "C"], "C, A") == ["A", "C"]
    with pytest.raises(InputError, match=r"do not know 'Efusion'; did you mean Effusion\? known"):
        choose_findings(["Mass", "Effusion"], "Efusion")


def test_whatever_is_no_column_of_ours_is_a_finding():
    table = pd.DataFrame(columns=["image_index", "Edema", "age", "split", "client", "Fracture"])
    assert findings_of(table) == ["Edema", "Fracture"]
