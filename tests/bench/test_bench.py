"""The harness itself: medians, targets, skipped rows, and the exit status."""

import json
import sys

import bench
import pytest
from bench import Bench, Skip, measure, median_interval


def steady(value, target, calls=2):
    return Bench(lambda *_: {"row": [value]}, {"row": target}, calls, calls)


def test_the_interval_of_nine_pairs_is_that_of_the_binomial_table():
    assert median_interval([5, 1, 9, 2, 8, 3, 7, 4, 6]) == (2, 8)


def test_the_interval_of_few_pairs_is_their_range():
    assert median_interval([2.0, 1.0, 3.0]) == (1.0, 3.0)


def test_a_target_that_is_met_takes_no_more_pairs_than_asked(tmp_path):
    [row] = measure(steady(1.03, "<= 1.03"), tmp_path, False)
    assert (row.met, row.pairs) == (True, 2)


def test_a_missed_target_is_measured_twice_as_long_and_stays_missed(tmp_path):
    [row] = measure(steady(1.9, ">= 2"), tmp_path, False)
    assert (row.met, row.pairs) == (False, 4)


def test_no_pair_is_left_out_when_a_noisy_row_is_measured_again(tmp_path):
    values = iter([9.0, 1.0, 1.0, 1.0])
    noisy = Bench(lambda *_: {"row": [next(values)]}, {"row": "<= 1.5"}, 2, 2)
    [row] = measure(noisy, tmp_path, False)
    assert (row.met, row.pairs, row.measured, row.interval) == (True, 4, 1.0, (1.0, 9.0))


def test_what_cannot_be_measured_says_why_and_is_neither_met_nor_missed(tmp_path):
    def absent(*_):
        raise Skip("pfl is not installed")

    [row] = measure(Bench(absent, {"row": "<= 1"}, 3, 3), tmp_path, False)
    assert (row.measured, row.met, row.note) == (None, None, "skipped: pfl is not installed")
    assert "skipped: pfl is not installed" in bench.line(row)


def test_an_arm_that_fails_is_a_missed_target_not_a_skipped_one(tmp_path, capsys):
    def broken(*_):
        return bench.run("no_such_arm.py")

    [row] = measure(Bench(broken, {"row": "<= 1"}, 1, 1), tmp_path, False)
    assert (row.measured, row.met) == (None, False)
    assert "no_such_arm.py failed" in row.note and "No such file" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (1.2, 1)])
def test_the_exit_status_tells_whether_a_target_was_missed(
    tmp_path, monkeypatch, capsys, value, status
):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "BENCHMARKS", {"only": steady(value, "<= 1.1", 1)})
    monkeypatch.setattr(sys, "argv", ["bench.py", "--fast"])
    assert bench.main() == status
    [row] = json.loads((tmp_path / "work" / "bench.json").read_text())
    assert (row["name"], row["measured"], row["target"], row["met"]) == (
        "row",
        value,
        "<= 1.1",
        not status,
    )
    assert "| row | " in capsys.readouterr().out


def test_every_target_of_the_table_can_be_read():
    for benchmark in bench.BENCHMARKS.values():
        for target in filter(None, benchmark.targets.values()):
            assert isinstance(bench.meets(1.0, target), bool)
