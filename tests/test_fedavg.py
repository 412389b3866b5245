"""The server: exact means, robust means, and each strategy against a hand-computed step."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_settings

from fedutils.base.state import cast_like
from fedutils.fedavg import AggregationParameters, FedAvg, TrimmedMean, WeightedMean
from fedutils.settings import FIELDS
from fedutils.strategies import STRATEGIES, VARIATE, FedAvgM

NUMBERS = st.floats(-1e6, 1e6, width=32)
CLIENTS = st.lists(
    st.tuples(st.lists(NUMBERS, min_size=3, max_size=3), st.integers(1, 10**5)),
    min_size=1,
    max_size=8,
)


def states(clients):
    return [({"w": torch.tensor(values, dtype=torch.float32)}, films) for values, films in clients]


def mean_of(pairs):
    mean = WeightedMean()
    for state, films in pairs:
        mean.add(state, films)
    return mean.result()


@given(CLIENTS)
def test_weighted_mean_equals_a_float64_oracle(clients):
    values = np.array([v for v, _ in clients], np.float32).astype(np.float64)
    weights = np.array([w for _, w in clients], np.float64)
    oracle = [math.fsum(column * weights) / weights.sum() for column in values.T]
    got = mean_of(states(clients))["w"]
    assert got.dtype == torch.float64
    assert np.allclose(got, oracle, rtol=1e-12, atol=1e-6 * 1e-6)


LABELS = st.lists(st.integers(0, 1000), min_size=3, max_size=3)


@given(st.lists(st.tuples(LABELS, st.integers(1, 1000)), min_size=1, max_size=5), st.data())
def test_a_row_of_the_head_is_weighted_by_the_labels_known_of_its_finding(counts, data):
    """All else by films; a row that nobody knows stays as it was."""
    row = st.lists(NUMBERS, min_size=2, max_size=2)
    mean, seen = WeightedMean(), []
    before = {"fc.weight": torch.full((3, 2), 7.0), "variate/fc.bias": torch.full((3,), 7.0)}
    for known, films in counts:
        head = torch.tensor(data.draw(st.lists(row, min_size=3, max_size=3)))
        state = {"fc.weight": head, "fc.bias": head[:, 0], "layer4.w": head[0]}
        mean.add(state, films, known)
        seen.append((head.double().numpy(), known, films))
    got = mean.result(before)
    for finding in range(3):
        weights = np.array([known[finding] for _, known, _ in seen], float)
        rows = np.array([head[finding] for head, _, _ in seen])
        wanted = weights @ rows / weights.sum() if weights.any() else np.full(2, 7.0)
        assert np.allclose(got["fc.weight"][finding], wanted, rtol=1e-9, atol=1e-6)
        bias = wanted[0] if weights.any() else 0.0  # nothing was there before
        assert np.isclose(got["fc.bias"][finding], bias, rtol=1e-9, atol=1e-6)
    films = np.array([films for *_, films in seen], float)
    wanted = films @ np.array([head[0] for head, *_ in seen]) / films.sum()
    assert np.allclose(got["layer4.w"], wanted, rtol=1e-9, atol=1e-6)


def test_where_all_labels_are_known_the_mean_has_the_bits_of_before():
    heads = torch.rand(3, 14, 512)
    plain, aware = WeightedMean(), WeightedMean()
    for head, films in zip(heads, (101, 57, 88), strict=True):
        plain.add({"fc.weight": head}, films)
        aware.add({"fc.weight": head}, films, [films] * 14)
    assert torch.equal(plain.result()["fc.weight"], aware.result()["fc.weight"])


@given(CLIENTS, st.randoms())
def test_weighted_mean_does_not_depend_on_the_order_of_clients(clients, random):
    """Names fix the order of the sum, so a shuffled arrival gives the same bits."""
    named = {f"client-{i}": pair for i, pair in enumerate(states(clients))}
    arrived = list(named)
    random.shuffle(arrived)
    again = mean_of(named[name] for name in sorted(arrived))["w"]
    assert torch.equal(again, mean_of(named.values())["w"])


def test_identical_clients_average_to_themselves_and_dtypes_are_restored():
    state = {"w": torch.rand(50), "n": torch.tensor(7), "h": torch.rand(3).half()}
    mean = cast_like(mean_of([(state, 3), (state, 1000)]), state)
    assert all(torch.equal(mean[k], state[k]) and mean[k].dtype == state[k].dtype for k in state)


def test_counters_stay_integers():
    mean = mean_of([({"n": torch.tensor(3)}, 1), ({"n": torch.tensor(8)}, 1)])
    assert cast_like(mean, {"n": torch.tensor(0)})["n"].dtype == torch.int64


def robust(trim, values):
    mean = TrimmedMean(trim)
    for value in values:
        mean.add({"w": torch.tensor([[float(value)]])}, 1)
    return mean.result()["w"].item()


def test_median_and_trimmed_mean_withstand_a_bad_client():
    assert robust(0.5, [1, 2, 1e9]) == 2 and robust(0.5, [1, 2, 4, 1e9]) == 3
    assert robust(0.2, [-1e9, 1, 2, 3, 1e9]) == 2 and robust(0.2, [1, 2, 3]) == 2
    assert robust(0.2, [1, 2, 6]) == 2, "one is cut at each end, however few answer"
    assert robust(0.2, [1, 2]) == 1.5 and robust(0.5, [5]) == 5


def test_a_share_of_all_clients_is_cut_though_floats_fall_short_of_it():
    values = [*[-1e6] * 29, *range(42), *[1e6] * 29]
    assert robust(0.29, values) == np.mean(range(42))


@pytest.mark.parametrize(
    ("rule", "trim", "least"),
    [("mean", 0.2, 1), ("median", 0.2, 3), ("trimmed", 0.2, 3), ("trimmed", 0.34, 3)],
)
def test_a_rule_knows_how_many_clients_it_needs(rule, trim, least):
    assert AggregationParameters(aggregation=rule, trim=trim).least_clients == least


def test_median_through_chunks_equals_numpy(monkeypatch):
    monkeypatch.setattr("fedutils.fedavg.SORTED_AT_ONCE", 7)
    values = torch.rand(5, 6, 11)
    mean = TrimmedMean(0.5)
    for value in values:
        mean.add({"w": value}, 1)
    assert np.array_equal(mean.result()["w"], np.median(values.double(), axis=0))


def make(name, tmp_path, **changes):
    if name == "scaffold":
        changes |= dict(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    return STRATEGIES[name](tiny_settings(tmp_path, strategy=name, **changes), {"w"})


OLD = {"w": torch.tensor([1.0, -2.0]), "bn.running_mean": torch.tensor([5.0])}
MEAN = {"w": torch.tensor([0.4, -1.0]).double(), "bn.running_mean": torch.tensor([7.0]).double()}


def test_fedavg_assigns_the_mean(tmp_path):
    new, server = make("fedavg", tmp_path).step(OLD, MEAN, {}, 1.0)
    assert torch.equal(new["w"], MEAN["w"].float()) and server == {}


def test_fedavgm_without_momentum_at_rate_one_is_fedavg(tmp_path):
    strategy = make("fedavgm", tmp_path, server_momentum=0.0, server_lr=1.0)
    new, _ = strategy.step(OLD, MEAN, {"w": torch.tensor([9.0, 9.0]).double()}, 1.0)
    assert torch.equal(new["w"], MEAN["w"].float())


def test_fedavgm_follows_the_paper_over_two_rounds(tmp_path):
    strategy = make("fedavgm", tmp_path, server_momentum=0.9, server_lr=0.5)
    first, server = strategy.step(OLD, MEAN, {}, 1.0)
    assert torch.allclose(first["w"], torch.tensor([0.7, -1.5]))
    second, _ = strategy.step(first, MEAN, server, 1.0)  # v = .9 (.6, -1) + (.3, -.5)
    assert torch.allclose(second["w"], torch.tensor([0.7 - 0.42, -1.5 + 0.7]))
    assert second["bn.running_mean"].item() == 7.0  # buffers are averaged, never stepped


def test_fedadam_follows_the_paper(tmp_path):
    new, server = make("fedadam", tmp_path, server_lr=0.01).step(OLD, MEAN, {}, 1.0)
    update = np.array([-0.6, 1.0])
    step = 0.01 * 0.1 * update / (np.sqrt(0.01 * update**2) + 1e-3)
    assert np.allclose(new["w"], np.array([1.0, -2.0]) + step, atol=1e-6)
    assert new["bn.running_mean"].item() == 7.0
    assert server.keys() == {"first/w", "second/w"}


def quadratics(tmp_path, name, rounds=200, steps=10, lr=0.05):
    """Two clients minimise a_i (w - b_i)^2 / 2 by gradient descent; SCAFFOLD's client by hand."""
    strategy, curvature, centre = make(name, tmp_path), (1.0, 9.0), (4.0, -1.0)
    state, server, kept = {"w": torch.zeros(1).double()}, {}, [torch.zeros(1).double()] * 2
    for _ in range(rounds):
        sent, mean = strategy.download(state, server), WeightedMean()
        for i in range(2):
            w, c = state["w"].clone(), sent.get(VARIATE + "w", torch.zeros(1))
            for _ in range(steps):
                gradient = curvature[i] * (w - centre[i])
                w = w - lr * (gradient + (c - kept[i] if name == "scaffold" else 0))
            new = kept[i] - c + (state["w"] - w) / (steps * lr)
            extra = {VARIATE + "w": new - kept[i]} if name == "scaffold" else {}
            mean.add({"w": w} | extra, 1)
            kept[i] = new
        state, server = strategy.step(state, mean.result(), server, 1.0)
    return state["w"].item()


def test_scaffold_reaches_the_optimum_where_fedavg_drifts(tmp_path):
    optimum = (1 * 4 + 9 * -1) / 10
    assert quadratics(tmp_path, "scaffold") == pytest.approx(optimum, abs=1e-4)
    assert abs(quadratics(tmp_path, "fedavg") - optimum) > 0.3


def test_scaffold_moves_its_variate_by_the_share_that_took_part(tmp_path):
    strategy = make("scaffold", tmp_path)
    mean = MEAN | {VARIATE + "w": torch.tensor([1.0, 2.0]).double()}
    new, server = strategy.step(OLD, mean, {}, 0.25)
    assert torch.equal(new["w"], MEAN["w"].float())
    assert torch.equal(server[VARIATE + "w"], torch.tensor([0.25, 0.5]))


def test_each_strategy_has_a_name_that_the_settings_know():
    assert tuple(STRATEGIES) == FIELDS["strategy"].metadata["allowed"]
    assert issubclass(FedAvgM, FedAvg)
