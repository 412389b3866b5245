"""The server: exact means, robust means, and each strategy against a hand-computed step."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_settings

from fedutils.base.fixed import ONE, Whole
from fedutils.base.state import LARGEST, cast_like, state_hash
from fedutils.fedavg import AggregationParameters, FedAvg, TrimmedMean, WeightedMean
from fedutils.settings import FIELDS
from fedutils.strategies import STRATEGIES, VARIATE, FedAvgM

NUMBERS = st.floats(-LARGEST, LARGEST, width=32)
CLIENTS = st.lists(
    st.tuples(st.lists(NUMBERS, min_size=3, max_size=3), st.integers(1, 10**5)),
    min_size=1,
    max_size=8,
)


def mean_of(pairs, known=(), before=None):
    """The mean of states by films, as clients of these films count in a round."""
    known = known or [()] * len(pairs)
    about = [SimpleNamespace(name=str(i), weight=n, known=k)
             for i, ((_, n), k) in enumerate(zip(pairs, known, strict=True))]  # fmt: skip
    mean = WeightedMean()
    whole = Whole.of(about)
    for (state, _), client in zip(pairs, about, strict=True):
        mean.add(state, *whole.shares(client))
    return mean.result(before)


def states(clients):
    return [({"w": torch.tensor(values, dtype=torch.float32)}, films) for values, films in clients]


def exact_mean(values, weights):
    """The weighted mean in rational numbers."""
    values, weights = [Fraction(float(v)) for v in values], [Fraction(float(w)) for w in weights]
    total = sum(v * w for v, w in zip(values, weights, strict=True))
    return float(total / sum(weights))


def assert_close(found, values, weights, films=None):
    """At most a float32 unit in the last place of the largest value, or the resolution, apart."""
    largest, took_part = np.float32(np.abs(values).max()), sum(weights) / (films or sum(weights))
    resolution = len(values) / min(took_part, 1) * 2.0**-43
    bound = max(float(np.spacing(largest)), resolution * (1 + 2 * float(largest)))
    assert abs(float(found) - exact_mean(values, weights)) <= bound


@given(CLIENTS)
def test_the_mean_is_within_a_float32_unit_in_the_last_place_of_the_exact_one(clients):
    got, weights = mean_of(states(clients))["w"], [films for _, films in clients]
    assert got.dtype == torch.float64
    for k, column in enumerate(np.array([v for v, _ in clients], np.float32).T):
        assert_close(got[k], column, weights)


def test_sums_at_the_end_of_the_range_do_not_turn_over():
    clients = [([LARGEST, -LARGEST, LARGEST], films) for films in (1, 3, 7, 100_000)]
    assert mean_of(states(clients))["w"].tolist() == [LARGEST, -LARGEST, LARGEST]


LABELS = st.lists(st.integers(0, 1000), min_size=3, max_size=3)


@given(st.lists(st.tuples(LABELS, st.integers(1, 1000)), min_size=1, max_size=5), st.data())
def test_a_row_of_the_head_is_weighted_by_the_labels_known_of_its_finding(counts, data):
    """All else by films; a row that nobody knows stays as it was."""
    row = st.lists(NUMBERS, min_size=2, max_size=2)
    heads = [torch.tensor(data.draw(st.lists(row, min_size=3, max_size=3))) for _ in counts]
    before = {"fc.weight": torch.full((3, 2), 7.0), "variate/fc.bias": torch.full((3,), 7.0)}
    pairs = [
        ({"fc.weight": h, "variate/fc.bias": h[:, 0], "fc.bias": h[:, 1], "layer4.w": h[0]}, n)
        for h, (_, n) in zip(heads, counts, strict=True)
    ]
    got = mean_of(pairs, [known for known, _ in counts], before)
    counted = sum(max(films, *known) for known, films in counts)
    for finding in range(3):
        weights = [known[finding] for known, _ in counts]
        for column in range(2):
            values = [float(head[finding, column]) for head in heads]
            found = got["fc.weight"][finding, column]
            if any(weights):
                assert_close(found, values, weights, counted)
            else:
                assert found == 7
        bias = got["variate/fc.bias"][finding], got["fc.bias"][finding]
        wanted = (got["fc.weight"] if any(weights) else torch.tensor([[7.0, 0.0]] * 3))[finding]
        assert torch.equal(torch.stack(bias), wanted)  # nothing was there before: 0
    for column in range(2):
        values = [float(head[0, column]) for head in heads]
        assert_close(got["layer4.w"][column], values, [films for _, films in counts], counted)


def test_where_all_labels_are_known_the_mean_has_the_bits_of_before():
    heads, films = torch.rand(3, 14, 512), (101, 57, 88)
    pairs = [({"fc.weight": head}, n) for head, n in zip(heads, films, strict=True)]
    plain, aware = mean_of(pairs), mean_of(pairs, [[n] * 14 for n in films])
    assert torch.equal(plain["fc.weight"], aware["fc.weight"])


@given(CLIENTS, st.randoms())
def test_the_mean_does_not_depend_on_the_order_of_clients(clients, random):
    about = [SimpleNamespace(name=str(i), weight=n, known=()) for i, (_, n) in enumerate(clients)]
    whole, hashes = Whole.of(about), set()
    for _ in range(3):
        mean = WeightedMean()
        for i in random.sample(range(len(clients)), len(clients)):
            mean.add(states(clients)[i][0], *whole.shares(about[i]))
        hashes.add(state_hash(mean.result()))
    assert len(hashes) == 1


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
        mean.add({"w": torch.tensor([[float(value)]])}, ONE)
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
            mean.add({"w": w} | extra, ONE // 2)
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
