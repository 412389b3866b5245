"""The harness itself: medians, targets, skipped rows, and the exit status."""

import json
import sys

import bench
import overhead
import pytest
import workload
from bench import Bench, Skip, measure, median_interval

from fedutils import write_phantom


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
            assert isinstance(bench.meets(1.0, target, 1.0), bool)
    assert workload.FILMS[64] == bench.FILMS


def test_a_limit_stands_beside_its_row_and_a_target_may_be_a_share_of_it(tmp_path):
    rows = {"row": [1.8], "limit of row": [2.0]}
    near = Bench(lambda *_: rows, {"row": ">= 0.9 of the limit"}, 1, 1)
    [row] = measure(near, tmp_path, False)
    assert (row.measured, row.limit, row.met) == (1.8, 2.0, True)
    assert bench.line(row) == "| row | 1.8 | 2 | 90% | >= 0.9 of the limit | yes |"
    far = Bench(lambda *_: rows | {"row": [1.7]}, {"row": ">= 0.9 of the limit"}, 1, 1)
    assert not measure(far, tmp_path, True)[0].met
    beaten = Bench(lambda *_: rows | {"row": [2.2]}, {"row": ">= 0.9 of the limit"}, 1, 1)
    assert "| 110% |" in bench.line(measure(beaten, tmp_path, True)[0])  # it was no limit
    fewer = Bench(lambda *_: rows | {"row": [2.5]}, {"row": "<= 3"}, 1, 1)
    assert measure(fewer, tmp_path, True)[0].share == 0.8
    with pytest.raises(ValueError, match="no limit was measured"):
        bench.meets(1.8, ">= 0.9 of the limit")


def test_a_row_that_was_promised_and_is_not_there_is_missed(tmp_path):
    half = Bench(lambda *_: {"row": [1.0]}, {"row": "<= 1", "other": "<= 1"}, 1, 1)
    assert [row.met for row in measure(half, tmp_path, False)] == [True, False]


def test_what_fails_in_any_way_costs_its_benchmark_only(tmp_path, capsys):
    def broken(*_):
        raise KeyError("rounds")

    [row] = measure(Bench(broken, {"row": "<= 1"}, 1, 1), tmp_path, True)
    assert row.met is False and "KeyError: 'rounds'" in capsys.readouterr().out


@pytest.mark.slow
def test_each_arm_that_needs_no_peer_runs(tmp_path):
    folder = str(tmp_path)
    workload.prepare(tmp_path, 64)
    assert len(bench.run("reading.py", work=folder, pairs=1)["steps"]) == 1
    for change in ({}, bench.CACHED):
        assert (
            len(bench.run("overhead.py", work=folder, pairs=1, **bench.SIDE | change)["bare"]) == 1
        )
    films = str(write_phantom(tmp_path / "films", 20, 64))
    bench.write_handwritten(tmp_path, films, tmp_path / "table.csv", tmp_path / "first.pth")
    how = {"films": str(tmp_path / "table.csv"), "weights": str(tmp_path / "first.pth")}
    how |= {"size": 64, "batch": 4, "epochs": 1, "rounds": 1}
    bound, hand = (bench.run(name, **how) for name in ("bound.py", "peer_handwritten.py"))
    assert 0 < bound["seconds"] < hand["total"]


def test_all_that_is_itemised_exists():
    for owner, name, _ in overhead.ITEMS:
        assert callable(getattr(owner, name))
