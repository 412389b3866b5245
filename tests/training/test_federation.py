"""The round loop: exact, repeatable, resumable, and robust against clients that fail."""

import dataclasses
import itertools
import json
import math
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from tiny import tiny_films, tiny_settings

from fedutils.base.errors import InputError
from fedutils.base.state import state_hash
from fedutils.client import Client
from fedutils.evidence.predict import predict_films
from fedutils.evidence.tables import best_rounds
from fedutils.fedavg import FedAvg
from fedutils.films.phantom.cases import FINDINGS
from fedutils.rounds import FederationError, sample_clients
from fedutils.run import HISTORY
from fedutils.settings import FIELDS, Settings
from fedutils.strategies import FedAdam, Scaffold
from fedutils.training import replicas, training
from fedutils.training.arms import arm_settings, plan
from fedutils.training.training import Training

SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05}
STRATEGIES = [
    {"strategy": "fedavg"},
    {"strategy": "fedavgm"},
    {"strategy": "fedadam"},
    {"strategy": "fedprox"},
    {"strategy": "scaffold"} | SGD,
    {"strategy": "scaffold", "local_steps": 3} | SGD,
    {"strategy": "fedavg", "batchnorm": "local"},
    {"strategy": "fedavg", "batchnorm": "frozen"},
    {"strategy": "fedavg", "batchnorm": "precise"},
    {"strategy": "fedavg", "aggregation": "median"},
    {"strategy": "scaffold", "client_fraction": 0.6} | SGD,
]
NAMES = ["-".join(str(v) for k, v in s.items() if k not in SGD) for s in STRATEGIES]


def train(work, **changes):
    settings = tiny_settings(work, **changes)
    return Training(settings, tiny_films(work)).train()


def aggregated(history):
    return history[history["client"] == ""]


def hashes(history):
    return aggregated(history)["state_sha256"].tolist()


def test_history_has_the_documented_columns_and_one_row_a_round_and_client(tmp_path):
    history = train(tmp_path)
    assert list(history.columns) == HISTORY
    assert history["client"].tolist() == ["client-1", "client-2", "client-3", ""] * 2
    assert aggregated(history)["val_auroc"].notna().all() and (history["status"] == "ok").all()
    stored = pd.read_csv(tmp_path / "runs/run/history.csv", keep_default_na=False)
    assert stored["state_sha256"].tolist() == history["state_sha256"].fillna("").tolist()


def test_one_client_is_centralised_training(tmp_path):
    """Both arms with the same single client: the mean of one update is that update."""
    films = tiny_films(tmp_path, clients=1)
    films.index["client"] = "all"
    settings = tiny_settings(tmp_path, arms="federated,centralised", num_clients=1)
    history = Training(settings, films).train()
    by_arm = aggregated(history).groupby("arm")["state_sha256"].agg(list)
    assert by_arm["federated"] == by_arm["centralised"]


def test_the_aggregate_is_the_weighted_mean_of_what_the_clients_sent(tmp_path, monkeypatch):
    sent = []
    fit = Client.fit

    def spy(self, *args):
        update, kept = fit(self, *args)
        sent.append(update)
        return update, kept

    monkeypatch.setattr(Client, "fit", spy)
    train(tmp_path, rounds=1, batchnorm="average")
    model = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")
    weights = np.array([update.examples for update in sent], float)
    for name in ("fc.weight", "layer1.0.bn1.running_mean"):
        values = np.stack([update.state[name].double().numpy() for update in sent])
        expected = np.tensordot(weights / weights.sum(), values, 1)
        assert np.allclose(model[name], expected, atol=1e-7)


def test_what_is_validated_is_the_aggregated_model(tmp_path):
    history = train(tmp_path, rounds=1)
    settings, films = tiny_settings(tmp_path, rounds=1), tiny_films(tmp_path)
    table = predict_films(settings, films, "val")
    labels = films.where(films.index["split"] == "val").labels
    p = table[list(FINDINGS)].to_numpy()
    loss = -(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean()
    assert aggregated(history)["val_loss"].item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("changes", STRATEGIES, ids=NAMES)
def test_killed_and_resumed_equals_rounds_straight(tmp_path, changes):
    straight = train(tmp_path, rounds=3, name="straight", **changes)
    train(tmp_path, rounds=1, name="parts", **changes)
    resumed = train(tmp_path, rounds=3, name="parts", **changes)
    assert hashes(resumed) == hashes(straight)
    drop = ["seconds"]
    assert resumed.drop(columns=drop).equals(straight.drop(columns=drop))
    last = [
        load_file(tmp_path / f"runs/{n}/models/federated-s0.safetensors")
        for n in ("straight", "parts")
    ]
    assert all(torch.equal(last[0][k], last[1][k]) for k in last[0])


@pytest.mark.parametrize("batchnorm", ["precise", "local"])
def test_one_two_and_four_replicas_give_one_history(tmp_path, batchnorm):
    """With one thread a replica nothing depends on the number of cores, models side by side too."""
    how = {"arms": "federated,centralised,local", "seeds": "3,1", "rounds": 1, "threads": 0}
    found = set()
    for device in ("cpu:0", "cpu,cpu", "cpu,cpu,cpu,cpu"):  # apart, or they would share models
        history = train(tmp_path / device, device=device, batchnorm=batchnorm, **how)
        assert len(history) == 2 * (1 + 3 + 1 + 3)
        found.add(history.drop(columns="seconds").to_csv())
        config = json.loads((tmp_path / device / "runs/run/config.json").read_text())
        assert config["threads"] == 1
    assert len(found) == 1


def test_predictions_are_those_of_one_replica_whatever_the_number(tmp_path):
    films = tiny_films(tmp_path, films=700)
    Training(tiny_settings(tmp_path, rounds=1), films).train()
    found = [
        predict_films(dataclasses.replace(tiny_settings(tmp_path), device=device), films, "train")
        for device in ("cpu:0", "cpu,cpu", "cpu,cpu,cpu,cpu")
    ]
    assert len(found[0]) == 420 and found[0].equals(found[1]) and found[0].equals(found[2])


def test_where_one_model_fails_the_others_stop_and_go_on_later(tmp_path, monkeypatch):
    how = {"arms": "federated,centralised", "device": "cpu,cpu", "rounds": 3}
    straight = train(tmp_path / "straight", **how)
    fit = Client.fit

    def broken(self, *args):
        if self.name == "all":
            raise RuntimeError("out of memory")
        return fit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", broken)
        with pytest.raises(FederationError, match="all failed"):
            train(tmp_path / "parts", **how)
    resumed = train(tmp_path / "parts", **how)
    assert resumed.drop(columns="seconds").equals(straight.drop(columns="seconds"))


def fit_for_long(patch):
    """Let clients train a thousand epochs; return the event that one has begun."""
    computing, fit = threading.Event(), Client.fit

    def fit_more(self, *args):
        settings = dataclasses.replace(self.settings, local_epochs=1000)
        computing.set()
        return fit(type(self)(self.name, self.films, settings, self.seed), *args)

    patch.setattr(Client, "fit", fit_more)
    return computing


@pytest.mark.parametrize("arms", ["federated", "federated,centralised"])
def test_an_interrupt_reaches_whoever_computes_and_the_run_goes_on(
    tmp_path, monkeypatch, interruptible, arms
):
    how = {"arms": arms, "device": "cpu,cpu", "local_epochs": 3}
    straight = train(tmp_path / "straight", **how)

    def interrupt():
        """Interrupt as one does that comes just as the main thread begins to wait: nothing wakes it."""
        assert computing.wait(60)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with monkeypatch.context() as patch:
        computing = fit_for_long(patch)
        threading.Thread(target=interrupt).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", **how)
        assert time.monotonic() - began < 60
    resumed = train(tmp_path / "parts", **how)
    assert resumed.drop(columns="seconds").equals(straight.drop(columns="seconds"))


def test_an_interrupt_before_all_models_have_begun_reaches_the_first(tmp_path, monkeypatch):
    computing = fit_for_long(monkeypatch)

    class Interrupted(ThreadPoolExecutor):
        def submit(self, task, *args):
            if computing.is_set():
                raise KeyboardInterrupt
            future = super().submit(task, *args)
            assert computing.wait(60)
            return future

    monkeypatch.setattr(training, "ThreadPoolExecutor", Interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, arms="federated,centralised", device="cpu,cpu")
    assert time.monotonic() - began < 60


def test_on_round_hears_of_each_round_in_the_thread_that_trains(tmp_path):
    films, seen = tiny_films(tmp_path), []
    how = {"arms": "federated,centralised,local", "device": "cpu,cpu"}

    def hear(row, history):
        seen.append((row["arm"], row["client"], row["round"]))
        assert threading.current_thread() is threading.main_thread()
        mine = history[(history["arm"] == row["arm"]) & (history["client"] == row["client"])]
        assert mine["round"].max() >= row["round"]

    Training(tiny_settings(tmp_path, **how), films).train(hear)
    assert len(seen) == len(set(seen)) == 2 * 5


def test_a_client_never_starts_from_the_batchnorm_that_another_left_in_its_replica(tmp_path):
    """In the first round a client has kept nothing yet: it starts from the initial BatchNorm."""
    how = {"batchnorm": "local", "rounds": 1}
    train(tmp_path / "one", device="cpu:0", **how)
    train(tmp_path / "three", device="cpu,cpu,cpu", **how)
    for client in ("client-1", "client-2", "client-3"):
        one, three = (
            load_file(tmp_path / name / f"runs/run/models/federated-s0-{client}.safetensors")
            for name in ("one", "three")
        )
        assert all(torch.equal(one[key], three[key]) for key in one)


def test_a_client_that_failed_keeps_no_batchnorm_that_it_never_trained(tmp_path, monkeypatch):
    fit = Client.fit

    def broken(self, *args):
        if self.name == "client-2":
            raise RuntimeError("out of memory")
        return fit(self, *args)

    monkeypatch.setattr(Client, "fit", broken)
    train(tmp_path, batchnorm="local", rounds=1)
    models = {path.stem for path in (tmp_path / "runs/run/models").glob("federated-s0-*")}
    assert models == {"federated-s0-client-1", "federated-s0-client-3"}


def test_the_order_in_which_clients_finish_does_not_matter(tmp_path, monkeypatch):
    expected = hashes(train(tmp_path / "plain"))
    fit = Client.fit

    def slow_first(self, *args):
        result = fit(self, *args)
        time.sleep(0.4 if self.name == "client-1" else 0)
        return result

    monkeypatch.setattr(Client, "fit", slow_first)
    assert hashes(train(tmp_path / "late", device="cpu,cpu")) == expected


def test_centralised_and_local_arms_share_the_loop(tmp_path):
    history = train(tmp_path, arms="federated,centralised,local", seeds="0,1", rounds=1)
    rows = history.groupby(["arm", "seed"]).size().to_dict()
    assert rows == {
        ("federated", 0): 4, ("federated", 1): 4, ("centralised", 0): 1,
        ("centralised", 1): 1, ("local", 0): 3, ("local", 1): 3,
    }  # fmt: skip
    local = history[history["arm"] == "local"]
    assert local["client"].tolist() == ["client-1", "client-2", "client-3"] * 2
    sent = history.groupby("arm")["bytes_up"].sum()
    assert sent["centralised"] == sent["local"] == 0 < sent["federated"]
    films = history[history["client"] == ""].groupby("arm")["examples"].first()
    assert films["federated"] == films["centralised"]  # the same budget
    table = predict_films(
        tiny_settings(tmp_path, arms="federated,centralised,local", seeds="0,1"),
        tiny_films(tmp_path),
        "test",
    )
    assert len(table) == 12 * (1 + 1 + 3) * 2 and table[list(FINDINGS)].notna().all().all()


def test_bytes_are_exact(tmp_path):
    history = train(tmp_path, tracked="layer4,fc", rounds=1, batchnorm="average")
    each = 4 * 13_121_550 + 4 * 7_168 + 8 * 7  # parameters, BatchNorm buffers, its 7 counters
    clients = history[history["client"] != ""]
    assert (clients["bytes_up"] == each).all() and (clients["bytes_down"] == each).all()
    assert aggregated(history)["bytes_up"].item() == 3 * each


def test_a_frozen_trunk_is_stored_once_and_shared_by_all_seeds(tmp_path):
    train(tmp_path, tracked="layer4,fc", seeds="0,1", rounds=1)
    trunk = load_file(tmp_path / "runs/run/models/trunk.safetensors")
    model = load_file(tmp_path / "runs/run/models/federated-s1.safetensors")
    assert not trunk.keys() & model.keys() and "conv1.weight" in trunk


def test_global_model_loads_into_plain_torchvision(tmp_path):
    train(tmp_path, tracked="layer4,fc", rounds=1)
    model = torchvision.models.resnet34(num_classes=14)
    model.load_state_dict(load_file(tmp_path / "runs/run/global_model.safetensors"))


def test_the_best_validation_round_is_kept(tmp_path, monkeypatch):
    scores = iter([0.6, 0.9, 0.7])
    monkeypatch.setattr(replicas, "judge", lambda sums: (1.0, next(scores)))
    history = train(tmp_path, rounds=3)
    model = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")
    assert state_hash(model) == hashes(history)[1]
    assert best_rounds(history)["round"].tolist() == [2]


def test_best_rounds_without_any_auroc_go_by_the_loss():
    rows = {"arm": "local", "seed": 0, "client": "a", "round": [1, 2, 3]}
    history = pd.DataFrame(rows | {"val_auroc": math.nan, "val_loss": [0.5, 0.3, 0.4]})
    assert best_rounds(history)["round"].tolist() == [2]


def test_without_validation_films_the_last_round_is_kept_and_reported(tmp_path):
    films = tiny_films(tmp_path)
    films.index.loc[films.index["split"] == "val", "split"] = "test"
    history = Training(tiny_settings(tmp_path, rounds=3), films).train()
    model = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")
    assert state_hash(model) == hashes(history)[2]
    assert best_rounds(history)["round"].tolist() == [3]


def unlabelled(work, name):
    """Films of which one client knows no label."""
    films = tiny_films(work)
    films.labels[(films.index["client"] == name).to_numpy()] = math.nan
    return films


def test_a_hospital_without_labels_weighs_nothing_and_costs_no_round(tmp_path):
    films = unlabelled(tmp_path / "all", "client-3")
    history = Training(tiny_settings(tmp_path / "all"), films).train()
    rows = history[history["client"] == "client-3"]
    assert set(rows["status"]) == {"unlabelled"} and set(rows["examples"]) == {0}
    assert set(aggregated(history)["examples"]) == {24} and set(history["round"]) == {1, 2}
    two = tiny_films(tmp_path / "two")
    others = two.where(two.index["client"] != "client-3")
    alone = Training(tiny_settings(tmp_path / "two"), others).train()
    # Beside it the others end as without it, but for the validation films.
    assert hashes(history) == hashes(alone)


def test_no_local_model_of_a_hospital_without_labels(tmp_path):
    films = unlabelled(tmp_path, "client-3")
    with pytest.raises(InputError, match="client-3 has no known label"):
        Training(tiny_settings(tmp_path, arms="federated,local"), films)


def test_a_hospital_weighs_by_its_known_labels(tmp_path):
    films = tiny_films(tmp_path)
    films.labels[(films.index["client"] == "client-3").to_numpy(), :7] = math.nan
    history = Training(tiny_settings(tmp_path, rounds=1), films).train()
    assert history["examples"].tolist() == [12, 12, 6, 30]


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_finding_that_one_hospital_looked_for_is_that_hospitals_alone(
    tmp_path, monkeypatch, strategy
):
    """And a finding that nobody looked for stays as it was drawn, whatever weight decay does."""
    films, sent = tiny_films(tmp_path), {}
    others = (films.index["client"] != "client-2").to_numpy()
    films.labels[others, 3] = films.labels[:, 5] = math.nan
    fit = Client.fit

    def spy(self, *args):
        update, kept = fit(self, *args)
        sent[self.name] = update.state
        return update, kept

    monkeypatch.setattr(Client, "fit", spy)
    changes = SGD if strategy == "scaffold" else {}
    training = Training(tiny_settings(tmp_path, rounds=1, strategy=strategy, **changes), films)
    training.train()
    head = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")["fc.weight"]
    start = training.models.start(0)["fc.weight"]
    assert torch.equal(head[3], sent["client-2"]["fc.weight"][3])
    assert torch.equal(head[5], start[5]) and not torch.equal(head[4], start[4])


def test_a_finding_that_few_hospitals_know_is_not_averaged_by_median(tmp_path):
    films = tiny_films(tmp_path)
    films.labels[(films.index["client"] == "client-3").to_numpy(), 2] = math.nan
    with pytest.raises(InputError, match="not every hospital has looked for every finding"):
        Training(tiny_settings(tmp_path, aggregation="median"), films)


@pytest.mark.parametrize(
    ("rule", "clients", "hint"),
    [
        ({"aggregation": "trimmed"}, 3, r"trim=0.2 of 3 clients.*trim=0.34 would"),
        ({"aggregation": "trimmed"}, 4, r"trim=0.2 of 4 clients.*trim=0.25 would"),
        ({"aggregation": "median"}, 2, "use mean"),
        ({"aggregation": "median", "client_fraction": 0.4}, 5, "median of 2 clients"),
    ],
)
def test_a_rule_that_cuts_off_nobody_is_refused_with_the_value_that_would(
    tmp_path, rule, clients, hint
):
    films = tiny_films(tmp_path, clients=clients)
    with pytest.raises(InputError, match=hint):
        Training(tiny_settings(tmp_path, num_clients=clients, **rule), films)


def test_a_round_of_too_few_for_its_rule_is_no_round(tmp_path, monkeypatch):
    break_client(monkeypatch, "client-2", "raises")
    with pytest.raises(FederationError, match="client-2 failed"):
        train(tmp_path, aggregation="median")


@pytest.mark.parametrize(
    "changes", [{"arms": "federated,federated"}, {"seeds": "0,0"}, {"seeds": "1,01"}]
)
def test_no_model_is_trained_twice(tmp_path, changes):
    with pytest.raises(InputError, match="names one twice"):
        tiny_settings(tmp_path, **changes)


def break_client(monkeypatch, name, how):
    fit = Client.fit

    def broken(self, *args):
        if self.name != name or args[3] != 1:
            return fit(self, *args)
        if how == "raises":
            raise RuntimeError("disk on fire")
        update, kept = fit(self, *args)
        if how == "nan":
            update.state["fc.bias"][0] = math.nan
        if how == "infinity":
            update.state["layer1.0.conv1.weight"][0] = math.inf
        if how == "variance":
            update.state["layer1.0.bn1.running_var"][3] = -1.0
        if how == "huge":
            update.state["fc.weight"][0] = 1e30
        object.__setattr__(update, "seconds", 999.0 if how == "late" else update.seconds)
        return update, kept

    monkeypatch.setattr(Client, "fit", broken)


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("raises", "failed", "RuntimeError: disk on fire"),
        ("nan", "non-finite", "fc.bias"),
        ("infinity", "non-finite", "layer1.0.conv1.weight"),
        ("variance", "out of range", "layer1.0.bn1.running_var, a variance, holds -1"),
        ("huge", "out of range", "fc.weight holds 1e+30"),
        ("late", "late", "took 999.0 s"),
    ],
)
def test_a_client_that_fails_costs_its_update_never_the_round(
    tmp_path, monkeypatch, how, status, reason
):
    break_client(monkeypatch, "client-2", how)
    history = train(tmp_path, client_seconds=500.0)
    row = history[(history["round"] == 1) & (history["client"] == "client-2")].iloc[0]
    assert row["status"] == status and reason in row["reason"]
    first, second = aggregated(history)["examples"]
    assert first == second - 12  # the weights of the rest are renormalised over their films
    assert np.isfinite(aggregated(history)["val_loss"]).all()


def test_a_client_without_films_is_named(tmp_path):
    films = tiny_films(tmp_path)
    films.index.loc[
        (films.index["client"] == "client-3") & (films.index["split"] == "train"), "split"
    ] = "test"
    history = Training(tiny_settings(tmp_path, rounds=1), films).train()
    row = history[history["client"] == "client-3"].iloc[0]
    assert row["status"] == "failed" and "no training films" in row["reason"]


def test_a_model_that_is_broken_is_not_judged_and_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "predict_with", lambda *about: np.full((1, 14), np.nan))
    history = aggregated(train(tmp_path))
    assert len(history) == 2 and history[["val_loss", "val_auroc"]].isna().all(axis=None)


def test_below_min_clients_the_run_stops_with_everything_saved(tmp_path, monkeypatch):
    train(tmp_path, rounds=1, min_clients=3)
    fit = Client.fit
    with monkeypatch.context() as patch:
        patch.setattr(
            Client, "fit", lambda self, *a: 1 / 0 if self.name == "client-1" else fit(self, *a)
        )
        with pytest.raises(FederationError, match=r"round 2.*client-1 failed \(ZeroDivisionError"):
            train(tmp_path, rounds=2, min_clients=3)
    stored = pd.read_csv(tmp_path / "runs/run/history.csv")
    assert stored[stored["round"] == 2]["status"].tolist() == ["failed", "ok", "ok"]
    history = train(tmp_path, rounds=2, min_clients=3)
    assert len(history) == 8 and not history.duplicated(["round", "client"]).any()


def test_max_hours_stops_at_a_round_boundary_and_the_next_session_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        clock = itertools.count(0, 600)  # each look at the clock takes ten minutes
        patch.setattr(training.time, "monotonic", lambda: next(clock))
        history = train(tmp_path, rounds=50, max_hours=0.9)
    assert aggregated(history)["round"].tolist() == [1, 2]
    assert not (tmp_path / "runs/run/finished.json").exists()
    more = train(tmp_path, rounds=3)
    assert aggregated(more)["round"].tolist() == [1, 2, 3]
    assert (tmp_path / "runs/run/finished.json").exists()


def test_another_run_under_the_same_name_is_refused_by_name(tmp_path):
    train(tmp_path, rounds=1)
    with pytest.raises(InputError, match=r"runs/run is a run with lr=0.001, not 0.01"):
        train(tmp_path, rounds=1, lr=0.01)
    report = tmp_path / "prepared" / "report.json"
    films = tiny_films(tmp_path)
    report.write_text(json.dumps({"fingerprint": "other data"}))
    with pytest.raises(InputError, match="fingerprint='tiny'"):
        Training(tiny_settings(tmp_path), films)


def test_a_moved_run_goes_on(tmp_path):
    expected = hashes(train(tmp_path / "a", rounds=2))
    train(tmp_path / "b", rounds=1)
    shutil.move(tmp_path / "b", tmp_path / "c")
    assert hashes(train(tmp_path / "c", rounds=2)) == expected


def test_own_strategy_in_a_few_lines(tmp_path):
    class Halfway(FedAvg):
        """Go only half of the way to the mean."""

        def step(self, state, mean, server, share):
            half = {k: (v + state[k].double()) / 2 for k, v in mean.items()}
            return super().step(state, half, server, share)

    settings = tiny_settings(tmp_path, name="own")
    history = Training(settings, tiny_films(tmp_path), Halfway).train()
    assert hashes(history) != hashes(train(tmp_path, name="plain"))
    with pytest.raises(InputError, match="server"):
        Training(settings, tiny_films(tmp_path))


def test_sampled_clients_follow_the_fraction_and_the_seed(tmp_path):
    settings = tiny_settings(tmp_path, client_fraction=0.6)
    job = plan(settings, tiny_films(tmp_path))[0]

    def draw(job):
        return [[c.name for c in sample_clients(job, settings, r)] for r in range(30)]

    assert all(len(names) == 2 and names == sorted(names) for names in draw(job))
    assert len({tuple(names) for names in draw(job)}) == 3 and draw(job) == draw(job)
    assert draw(dataclasses.replace(job, seed=1)) != draw(job)


def test_estimate_is_of_the_right_order(tmp_path, monkeypatch):
    """In CPU time, which other work on the machine does not take away."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    settings = tiny_settings(tmp_path, rounds=6)
    training = Training(settings, tiny_films(tmp_path, films=200))
    estimate = training.estimate_seconds()
    seconds = aggregated(training.train())["seconds"].sum()
    assert 0.3 < estimate / seconds < 3
    assert training.estimate_seconds() == 0


def test_threads_left_by_other_work_do_not_change_a_run(tmp_path):
    """A frozen trunk is calibrated, too, with the threads of the run."""
    torch.set_num_threads(2)
    two = hashes(train(tmp_path, name="two", rounds=1))
    torch.set_num_threads(1)
    assert hashes(train(tmp_path, name="one", rounds=1)) == two


def test_runs_share_the_models_that_do_not_depend_on_what_differs(tmp_path, monkeypatch):
    """The centralised arm knows no partition; local models know no strategy."""
    arms = {"arms": "federated,centralised,local", "rounds": 1}
    first = train(tmp_path, name="first", **arms)
    trained = []
    fit = Client.fit
    monkeypatch.setattr(Client, "fit", lambda s, *a: (trained.append(s.name), fit(s, *a))[1])
    prox = train(tmp_path, name="prox", strategy="fedprox", mu=1.0, **arms)
    assert trained == ["client-1", "client-2", "client-3"]  # of the federated arm alone
    alone = [history[history["arm"] != "federated"] for history in (first, prox)]
    assert (alone[1]["reason"] == "adopted from run first").all()
    assert alone[0].drop(columns="reason").equals(alone[1].drop(columns="reason"))
    trained.clear()
    train(tmp_path, name="iid", num_clients=2, **arms)
    assert "all" not in trained and len(trained) == 6
    for name in ("trunk", "federated-s0", "centralised-s0", "local-s0-client-1"):
        assert (tmp_path / f"runs/iid/models/{name}.safetensors").is_file()


def test_a_model_with_more_rounds_another_rate_or_another_trunk_is_not_shared(tmp_path):
    arms = {"arms": "centralised", "rounds": 2}
    hash_of = hashes(train(tmp_path, name="first", **arms))
    assert len(train(tmp_path, name="short", arms="centralised", rounds=1)) == 1
    rate = train(tmp_path, name="rate", lr_centralised=0.01, **arms)
    trunk = train(tmp_path, name="trunk", seeds="1,0", **arms)
    assert hashes(rate) != hash_of
    assert trunk[trunk["seed"] == 0]["state_sha256"].tolist() != hash_of


def test_each_arm_has_its_own_rate_and_who_trains_alone_federates_nothing():
    settings = dataclasses.replace(
        Settings(lr=0.001), strategy="fedprox", lr_local=0.1, batchnorm="local", partition="scanner"
    )
    own = {arm: arm_settings(settings, arm) for arm in FIELDS["arms"].metadata["parts"]}
    assert [own[arm].lr for arm in FIELDS["arms"].metadata["parts"]] == [0.001, 0.001, 0.1]
    assert [own[arm].strategy for arm in FIELDS["arms"].metadata["parts"]] == [
        "fedprox",
        "fedavg",
        "fedavg",
    ]
    assert [own[arm].batchnorm for arm in FIELDS["arms"].metadata["parts"]] == [
        "local",
        "average",
        "average",
    ]
    assert [own[arm].partition for arm in FIELDS["arms"].metadata["parts"]] == [
        "scanner",
        "iid",
        "scanner",
    ]


def test_a_model_that_breaks_is_neither_kept_nor_reported(tmp_path, monkeypatch):
    scores = iter([(0.5, 0.6), (math.nan, math.nan), (0.6, 0.5)])
    monkeypatch.setattr(replicas.Replicas, "validate", lambda *about: next(scores))
    history = train(tmp_path, rounds=3)
    assert best_rounds(history)["round"].tolist() == [1]
    kept = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")
    assert state_hash(kept) == aggregated(history)["state_sha256"].iloc[0]


def test_an_own_strategy_is_asked_what_it_can_work_with_and_brings_its_rate(tmp_path):
    class Own(FedAdam):
        pass

    class Variates(Scaffold):
        pass

    def run(name, own=None, **changes):
        settings = tiny_settings(tmp_path, name=name, rounds=1, **changes)
        return Training(settings, tiny_films(tmp_path), own).train()

    assert hashes(run("own", Own)) == hashes(run("named", strategy="fedadam"))
    assert hashes(run("given", Own, server_lr=0.5)) != hashes(run("own", Own))
    with pytest.raises(InputError, match="scaffold wants optimizer=sgd"):
        run("variates", Variates)


def test_a_fifth_cut_off_of_five_is_one_of_the_four_that_answer(tmp_path, monkeypatch):
    how = {"aggregation": "trimmed", "trim": 0.2, "num_clients": 5, "rounds": 1}
    fit = Client.fit

    def liar(self, *args):
        update, kept = fit(self, *args)
        if self.name == "client-1":
            update.state["fc.bias"].fill_(math.nan)
        if self.name == "client-2":
            update.state["fc.bias"].fill_(50.0)
        return update, kept

    monkeypatch.setattr(Client, "fit", liar)
    settings = tiny_settings(tmp_path, **how)
    history = Training(settings, tiny_films(tmp_path, clients=5)).train()
    assert history["status"].tolist().count("non-finite") == 1
    state = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")
    assert state["fc.bias"].abs().max() < 10


@pytest.mark.parametrize("what", ["shape", "one more", "missing", "empty"])
def test_an_update_that_does_not_fit_is_that_clients_fault(tmp_path, monkeypatch, what):
    fit = Client.fit

    def misfit(self, *args):
        update, kept = fit(self, *args)
        if self.name == "client-2":
            state = update.state
            state |= {"shape": {"fc.bias": torch.zeros(3)}, "one more": {"film": torch.zeros(3)},
                      "empty": {"fc.bias": torch.zeros(0)}, "missing": {}}[what]  # fmt: skip
            if what == "missing":
                del state["fc.bias"]
        return update, kept

    monkeypatch.setattr(Client, "fit", misfit)
    history = train(tmp_path, rounds=1)
    row = history[history["client"] == "client-2"].iloc[0]
    assert row["status"] == "failed" and "does not fit" in row["reason"]
    assert aggregated(history)["status"].tolist() == ["ok"]


def test_a_hospital_without_labels_is_none_of_the_three_that_a_median_wants(tmp_path):
    films = tiny_films(tmp_path)
    films.labels[(films.index["client"] == "client-2").to_numpy()] = np.nan
    with pytest.raises(InputError, match="median of 2 clients cuts off nobody"):
        Training(tiny_settings(tmp_path, aggregation="median"), films)


def unequal(work):
    """Films of which client-1 has 24 to train on, client-2 9 and client-3 3."""
    films = tiny_films(work)
    train = (films.index["split"] == "train").to_numpy()
    films.index.loc[train, "client"] = np.repeat(["client-1", "client-2", "client-3"], [24, 9, 3])
    return films


def test_unequal_sites_take_equal_steps_and_weigh_by_their_films(tmp_path, monkeypatch):
    films, steps, end = unequal(tmp_path), {}, FedAvg.end

    def told(self, sent, kept, final, taken):
        steps.setdefault(taken, []).append(1)
        return end(self, sent, kept, final, taken)

    monkeypatch.setattr(FedAvg, "end", told)
    settings = tiny_settings(tmp_path, local_steps=4, rounds=1)
    history = Training(settings, films).train()
    assert history["examples"].tolist() == [24, 9, 3, 36]
    assert {taken: len(times) for taken, times in steps.items()} == {4: 3}


def test_the_centralised_arm_takes_the_steps_of_all_clients(tmp_path, monkeypatch):
    films, batches = unequal(tmp_path), []
    batch = type(films).batch
    monkeypatch.setattr(
        type(films), "batch", lambda self, *at: (batches.append(len(at[0])), batch(self, *at))[1]
    )
    how = {"local_steps": 4, "rounds": 1, "batchnorm": "frozen", "batch_size": 3}
    for arms in ("federated", "centralised"):
        Training(tiny_settings(tmp_path, arms=arms, name=arms, **how), films).train()
    assert batches.count(3) == 2 * 3 * 4  # each client's films are a multiple of three


def test_local_steps_are_another_run_and_epochs_beside_them_are_refused(tmp_path):
    names = {tiny_settings(tmp_path, name="", local_steps=steps).name for steps in (0, 4, 5)}
    assert len(names) == 3
    with pytest.raises(InputError, match="local_epochs=2 means nothing with local_steps=4"):
        tiny_settings(tmp_path, local_steps=4, local_epochs=2)


def test_the_estimate_counts_steps_not_films(tmp_path, monkeypatch):
    """In CPU time, which other work on the machine does not take away."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    settings = tiny_settings(tmp_path, rounds=3, local_steps=12)
    training = Training(settings, unequal(tmp_path))
    estimate = training.estimate_seconds()
    seconds = aggregated(training.train())["seconds"].sum()
    assert 0.3 < estimate / seconds < 3


def test_who_took_too_long_is_in_the_history_and_in_a_printed_line(tmp_path, monkeypatch, capsys):
    fit = Client.fit

    def slow(self, *about):
        update, kept = fit(self, *about)
        seconds = 99.5 if self.name == "client-2" and about[3] == 1 else 0.1
        return dataclasses.replace(update, seconds=seconds), kept

    monkeypatch.setattr(Client, "fit", slow)
    history = train(tmp_path, client_seconds=60.0)
    assert history[history["client"] == "client-2"]["status"].tolist() == ["late", "ok"]
    assert aggregated(history)["examples"].tolist() == [24, 36]
    said = "federated-s0, round 1: client-2 late: took 99.5 s, client_seconds is 60\n"
    assert capsys.readouterr().out == said
