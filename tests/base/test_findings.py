"""Findings are the columns of a table that are about nothing else."""

import pandas as pd
import pytest

from fedutils.base.errors import InputError
from fedutils.base.findings import choose_findings, findings_of


def test_a_list_chooses_findings_in_the_datas_order_and_a_typing_error_is_named():
    assert choose_findings(["A", "B", "C"], "") == ["A", "B", "C"]
    assert choose_findings(["A", "B", "C"], "C, A") == ["A", "C"]
    with pytest.raises(InputError, match=r"do not know 'Efusion'; did you mean Effusion\? known"):
        choose_findings(["Mass", "Effusion"], "Efusion")


def test_whatever_is_no_column_of_ours_is_a_finding():
    table = pd.DataFrame(columns=["image_index", "Edema", "age", "split", "client", "Fracture"])
    assert findings_of(table) == ["Edema", "Fracture"]
