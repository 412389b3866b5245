"""The statistics of the aggregated model are measured on its films, not averaged from its past."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROUNDING, tiny_films, tiny_settings

from fedutils.base.fixed import Pool
from fedutils.client import Client
from fedutils.dataset import normalise
from fedutils.fedavg import AggregationParameters, FedAvg
from fedutils.model import build_resnet34
from fedutils.rounds import FederationError
from fedutils.training import batchnorm
from fedutils.training.batchnorm import about_center, measure_batchnorm, pool_batchnorm
from fedutils.training.training import Training


@pytest.fixture
def films(tmp_path):
    return tiny_films(tmp_path)


def client_of(films, tmp_path, **changes):
    return Client("client-1", films, tiny_settings(tmp_path, **changes), seed=0)


@torch.no_grad()
def seen_by_layer1(model, films):
    """What the first BatchNorm of layer1 sees of all films, computed by hand."""
    model.eval()
    x = normalise(films.batch(np.arange(len(films)))[0])
    return model.layer1[0].conv1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))


def pooled_of(measured, like, **changes):
    """What the server makes of clients' statistics and films."""
    settings = AggregationParameters(**changes)
    clients = [SimpleNamespace(name=str(i), weight=n, known=[])
               for i, (_, n) in enumerate(measured)]  # fmt: skip

    def another():
        return Pool(FedAvg(settings).aggregator(), clients)

    pool = another()
    seen = {client.name: state for client, (state, _) in zip(clients, measured, strict=True)}
    for name, state in seen.items():
        pool.add(name, state)
    return pool_batchnorm(pool, seen, like, another)


def test_pooled_statistics_are_those_of_all_films_together():
    rng = np.random.default_rng(0)
    parts = [rng.normal(k, 1 + k, (n, 5)) for k, n in enumerate((10, 200, 37))]
    like = {"bn.running_mean": torch.full((5,), 3.0), "bn.running_var": torch.zeros(5)}
    measured = []
    for part in parts:
        mean, var = torch.tensor(part.mean(0)), torch.tensor(part.var(0))
        state = about_center({"bn.running_mean": mean, "bn.running_var": var}, like)
        measured.append((state, len(part)))
    pooled, together = pooled_of(measured, like), np.concatenate(parts)
    assert np.allclose(pooled["bn.running_mean"], together.mean(0), atol=1e-6)
    assert np.allclose(pooled["bn.running_var"], together.var(0), rtol=1e-5)


@pytest.mark.parametrize("trim", (0.2, 0.5))
def test_a_liar_moves_measured_statistics_no_further_than_an_honest_client(trim):
    measured, honest = [], [(0.0, 1.0), (0.2, 1.2), (0.1, 0.8), (0.3, 1.1)]
    like = {"bn.running_mean": torch.full((1,), -2.0), "bn.running_var": torch.zeros(1)}
    for mean, var in [*honest, (100.0, 1e4)]:
        about = {"bn.running_mean": torch.tensor([mean]), "bn.running_var": torch.tensor([var])}
        measured.append((about_center(about, like), 10))
    pooled = pooled_of(measured, like, aggregation="trimmed", trim=trim)
    assert 0 <= pooled["bn.running_mean"] <= 0.3 and 0.8 <= pooled["bn.running_var"] <= 1.3


def test_where_nobody_can_measure_the_averages_stay(tmp_path, monkeypatch):
    films, states = tiny_films(tmp_path), []
    for policy in ("average", "precise"):
        settings = tiny_settings(tmp_path, name=policy, batchnorm=policy, rounds=1)
        with monkeypatch.context() as patch:
            patch.setattr(batchnorm, "measure_batchnorm", lambda *about: 1 / 0)
            states.append(Training(settings, films).train()["state_sha256"].iloc[-1])
    assert states[0] == states[1]


def test_a_client_measures_the_tracked_layers_under_the_global_state(films, tmp_path):
    model = build_resnet34("none", "layer1,fc", outputs=14)
    state = {name: value.clone() for name, value in model.tracked_state().items()}
    client = client_of(films, tmp_path, batch_size=60)
    measured = about_center(measure_batchnorm(client, model, state, round=1), state, -1)
    measured = {name: value.float() for name, value in measured.items()}
    assert set(measured) == {k for k in state if "running_" in k}
    model.load(state)
    x = seen_by_layer1(model, films)
    assert torch.allclose(measured["layer1.0.bn1.running_mean"], x.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(measured["layer1.0.bn1.running_var"], x.var((0, 2, 3)), rtol=1e-3)


def test_only_statistics_change_and_frozen_layers_stay(films, tmp_path):
    model = build_resnet34("none", "layer1,fc", outputs=14)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in model.tracked_state().items()}
    measured = measure_batchnorm(client_of(films, tmp_path), model, state, round=1)
    model.load(state | measured)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(n.startswith("layer1.") and "running_" in n for n in changed)


def test_measured_statistics_follow_the_films_where_averages_lag(tmp_path):
    """After two short rounds the averages remember the start; measured ones fit the model."""
    films, lag = tiny_films(tmp_path), {}
    train = films.where(films.index["split"] == "train")
    for policy in ("average", "precise"):
        settings = tiny_settings(tmp_path, name=policy, batchnorm=policy, lr=0.01)
        Training(settings, films).train()
        model = build_resnet34("none", "layer1,fc", outputs=14)
        for name in ("trunk", "federated-s0"):
            model.load(load_file(settings.run / f"models/{name}.safetensors"))
        exact = seen_by_layer1(model, train).double().mean((0, 2, 3))
        lag[policy] = (model.layer1[0].bn1.running_mean - exact).norm() / exact.norm()
    assert lag["precise"] <= ROUNDING
    assert lag["average"] > 0.05


def test_what_measuring_sends_is_counted(tmp_path):
    films = tiny_films(tmp_path)
    histories = {
        policy: Training(
            tiny_settings(tmp_path, name=policy, batchnorm=policy, rounds=1), films
        ).train()
        for policy in ("average", "precise")
    }
    up, down = (
        [histories[policy][column].iloc[0] for policy in ("average", "precise")]
        for column in ("bytes_up", "bytes_down")
    )
    statistics = 6 * 2 * 64  # layer1: six layers, mean and variance, 64 channels
    assert up[1] - up[0] == 8 * statistics and down[1] - down[0] == 4 * statistics


def test_a_client_that_cannot_measure_is_named_and_its_update_counts(tmp_path, monkeypatch):
    measure = measure_batchnorm

    def broken(client, *args):
        if client.name == "client-2":
            raise RuntimeError("out of memory")
        return measure(client, *args)

    monkeypatch.setattr(batchnorm, "measure_batchnorm", broken)
    settings = tiny_settings(tmp_path, batchnorm="precise", rounds=1)
    history = Training(settings, tiny_films(tmp_path)).train().set_index("client")
    assert history["status"].to_dict()["client-2"] == "unmeasured"
    assert (
        history.loc["client-2", "reason"] == "BatchNorm not measured: RuntimeError: out of memory"
    )
    assert history.loc["", "examples"] == history.drop("")["examples"].sum()


def test_a_round_that_fewer_than_min_clients_measured_is_repeated(tmp_path, monkeypatch):
    """For its bits would be others; the next start of the same command has those undisturbed."""
    films, changes = tiny_films(tmp_path), {"batchnorm": "precise", "rounds": 1, "min_clients": 3}
    expected = Training(tiny_settings(tmp_path, name="alone", **changes), films).train()
    measure = measure_batchnorm

    def broken(client, *args):
        if client.name == "client-2":
            raise RuntimeError("out of memory")
        return measure(client, *args)

    (tmp_path / "runs/alone/finished.json").unlink()  # nothing to adopt
    settings = tiny_settings(tmp_path, name="again", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(batchnorm, "measure_batchnorm", broken)
        with pytest.raises(FederationError, match="too few measured BatchNorm: client-2"):
            Training(settings, films).train()
    history = Training(settings, films).train()
    assert history["state_sha256"].iloc[-1] == expected["state_sha256"].iloc[-1]
