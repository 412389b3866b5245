"""The comparison of two revisions notices whatever differs, and names it."""

import copy

import pytest
from same_bits import SHA, compare

LAST = f"{SHA}federated s0, round 2"
RUNS = {
    "fedavg": {LAST: "aa", "metrics.csv": "arm,value\nfederated,0.5\nlocal,0.6\n"},
    "phantom": {"images.npy": "cc"},
}


def changed(run, **files):
    """Made-up results in which these files of a run have another content; None: are missing."""
    now = copy.deepcopy(RUNS)
    now[run] = {k: v for k, v in (now[run] | files).items() if v is not None}
    return now


def test_equal_runs_differ_in_nothing():
    assert compare(RUNS, copy.deepcopy(RUNS)) == []


def test_another_hash_is_named_with_its_run_and_round():
    [line] = compare(RUNS, changed("fedavg", **{LAST: "bb"}))
    assert line == "fedavg: state_sha256 of federated s0, round 2: line 1 was 'aa', is 'bb'"


def test_another_table_is_named_with_its_first_differing_line():
    table = RUNS["fedavg"]["metrics.csv"].replace("0.6", "0.7")
    [line] = compare(RUNS, changed("fedavg", **{"metrics.csv": table}))
    assert line == "fedavg: metrics.csv: line 3 was 'local,0.6', is 'local,0.7'"


@pytest.mark.parametrize("end", ["", "\nmore"])
def test_a_shorter_or_a_longer_table_differs(end):
    table = RUNS["fedavg"]["metrics.csv"].rstrip("\n") + end
    assert len(compare(RUNS, changed("fedavg", **{"metrics.csv": table}))) == 1


def test_a_missing_run_or_file_is_named_on_either_side():
    less = {"fedavg": RUNS["fedavg"]}
    assert compare(RUNS, less) == ["phantom: with the working tree: missing"]
    assert compare(less, RUNS) == ["phantom: with the revision: missing"]
    less = changed("fedavg", **{"metrics.csv": None})
    assert compare(RUNS, less) == ["fedavg: metrics.csv: only with the revision"]
    assert compare(less, RUNS) == ["fedavg: metrics.csv: only with the working tree"]


def test_a_run_that_fails_on_both_sides_is_no_equality():
    failed = RUNS | {"fedavg": {"error": "ValueError: no films"}}
    assert compare(failed, failed) == [
        "fedavg: with the revision: ValueError: no films",
        "fedavg: with the working tree: ValueError: no films",
    ]
