"""Differential privacy of patients: what is clipped, drawn, added, accounted for, and sent."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import integrate, stats
from tiny import ROUNDING, smooth, tiny_films, tiny_settings
from torch import nn

from fedutils.base.errors import InputError
from fedutils.base.rng import generator
from fedutils.base.state import to_cpu
from fedutils.client import Client, make_optimizer
from fedutils.dataset import draw_motion, normalise
from fedutils.evidence.tables import adopted_models
from fedutils.evidence.words import privacy_words
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.phantom.write import draw_batch
from fedutils.model import build_resnet34
from fedutils.privacy import client as private
from fedutils.privacy import gradients
from fedutils.privacy.accountant import _rdp, calibrate_noise, epsilon
from fedutils.privacy.client import STEPS, PrivateClient
from fedutils.privacy.gradients import (
    SystemRandomness,
    add_noise,
    clipped_sum,
    convolution_norms,
    draw_films,
    freeze_batchnorm,
    per_patient_norms,
)
from fedutils.privacy.ledger import Ledger
from fedutils.rounds import FederationError
from fedutils.strategies import Scaffold
from fedutils.training.training import Training

pytest.importorskip("opacus", reason="differential privacy needs Opacus")
DP = {"dp": "patient", "noise_multiplier": 1.0, "batchnorm": "frozen", "tracked": "fc"}
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1}


def many_films(work, films=60):
    """Random films of which two follow each other belong to one patient."""
    dataset = tiny_films(work, films)
    dataset.index["patient_id"] = [f"p{i // 2}" for i in range(films)]
    dataset.index["client"] = [f"client-{i // 8 % 3 + 1}" for i in range(films)]
    dataset.index["split"] = np.array(["train", "train", "val", "test"])[np.arange(films) // 2 % 4]
    return dataset


@pytest.fixture
def films(tmp_path):
    dataset = many_films(tmp_path)
    return dataset.where(dataset.index["split"] == "train")


def private_client(tmp_path, films, **changes):
    return PrivateClient("client-1", films, tiny_settings(tmp_path, **DP | changes), 0)


def build(tracked="fc"):
    model = build_resnet34(
        "none", tracked, "frozen", draw_films=lambda: draw_batch(32, 64), outputs=14
    ).train()
    freeze_batchnorm(model)
    return model


def sum_of(model, films, positions, clip, motion=None):
    with per_patient_norms(model) as hooked:
        return torch.cat([s.flatten() for s in clipped_sum(hooked, films, positions, clip, motion)])


# The accountant.


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "dp_accounting", "opacus"),
    [
        (1, 1, 10, 19.0536, 19.0536),
        (1, 4, 50, 9.2350, 9.2350),
        (0.5, 1, 10, 11.5445, 11.5371),
        (0.25, 4, 50, 2.0316, 2.0316),
    ],
)
def test_epsilon_agrees_with_published_figures_of_two_libraries(
    rate, noise, steps, dp_accounting, opacus
):
    found = epsilon(noise, rate, steps, 1e-5)
    assert found == pytest.approx(opacus, abs=1e-4)
    assert found == pytest.approx(dp_accounting, abs=0.01)


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.1, 1.1, 300), (0.02, 2, 99), (1, 3, 7)])
def test_epsilon_agrees_with_a_second_library(rate, noise, steps):
    """dp-accounting 0.6 only bounds the orders between whole numbers: it is a little above."""
    dp = pytest.importorskip("dp_accounting", reason="the second library is not installed")
    event = dp.GaussianDpEvent(noise)
    accountant = dp.rdp.RdpAccountant()
    accountant.compose(dp.PoissonSampledDpEvent(rate, event) if rate < 1 else event, steps)
    ours, theirs = epsilon(noise, rate, steps, 1e-5), accountant.get_epsilon(1e-5)
    assert -1e-4 < theirs - ours < 0.01 * ours


@pytest.mark.parametrize("order", [1.5, 2, 2.8, 7.3])
def test_divergence_of_a_step_equals_its_integral(order):
    """Mironov, Talwar and Zhang, 2019: of the mixture over the normal density, to that order."""
    from opacus.accountants import RDPAccountant

    rate, noise = 0.1, 1.1

    def integrand(z):
        ratio = 1 - rate + rate * math.exp((2 * z - 1) / (2 * noise**2))
        return stats.norm.pdf(z, scale=noise) * ratio**order

    exact = math.log(integrate.quad(integrand, -30, 60, limit=500)[0]) / (order - 1)
    found = _rdp(noise, rate)[RDPAccountant.DEFAULT_ALPHAS.index(order)]
    assert found == pytest.approx(exact, rel=1e-6)


def test_epsilon_at_full_sampling_agrees_with_the_exact_privacy_curve():
    """Without sampling, n steps are one Gaussian mechanism, whose curve is known exactly.

    Balle and Wang, ICML 2018, theorem 8. Rényi's bound lies above it, and not far.
    """
    mu, eps = math.sqrt(10) / 4, epsilon(4, 1, 10, 1e-5)

    def delta(e):
        normal = stats.norm.cdf
        return normal(mu / 2 - e / mu) - math.exp(e) * normal(-mu / 2 - e / mu)

    assert delta(eps) < 1e-5 < delta(0.75 * eps)


def test_noise_for_a_target_stays_just_within_it():
    for target in (0.5, 8.0):
        noise = calibrate_noise(target, 1e-5, 1.0, 60)
        assert 0.98 * target < epsilon(noise, 1.0, 60, 1e-5) <= target


def test_no_step_costs_nothing_and_no_noise_everything():
    assert epsilon(1.0, 0.5, 0, 1e-5) == 0
    assert epsilon(0.0, 0.5, 1, 1e-5) == math.inf


# Clipping.


@pytest.mark.parametrize("tracked", ["fc", "layer1,fc"])
def test_removing_any_patient_moves_the_clipped_sum_by_at_most_clip(films, tracked):
    """Among them one whose gradient is made huge, and films whose labels are partly unknown."""
    films.labels[2, :] = math.nan
    films.labels[4, 3:] = math.nan
    model, everyone = smooth(build(tracked)), np.arange(0, len(films), 2)[:6]
    with torch.no_grad():
        model.fc.weight[0] *= 1e4
    motion = draw_motion(generator(0, "test"), 6)  # each patient's own, whoever else is there
    alone = [
        sum_of(model, films, everyone[i : i + 1], math.inf, motion[:, i : i + 1]).norm().item()
        for i in range(6)
    ]
    clip = np.median(alone)  # half of the patients are clipped, half keep their gradient
    whole = sum_of(model, films, everyone, clip, motion)
    without = [
        sum_of(model, films, np.delete(everyone, i), clip, np.delete(motion, i, axis=1))
        for i in range(6)
    ]
    moved = [(whole - part).norm() for part in without]
    others = 5 * clip * ROUNDING  # in a batch of another size they may be rounded otherwise
    assert max(moved) <= clip * (1 + 1e-5) + others
    assert max(moved) > 0.98 * clip and max(alone) > 2 * clip  # the bound is reached
    assert alone[1] == 0 and moved[1] <= others  # without labels one adds and changes nothing


@pytest.mark.parametrize("tracked", ["fc", "layer4,fc", "layer1,layer2,fc"])
def test_each_film_is_clipped_to_its_own_norm_over_all_layers(films, tracked):
    """Whether a layer's norm comes of its positions' products or of the gradient itself."""
    model, positions = smooth(build(tracked)), np.arange(5)
    alone = [sum_of(model, films, positions[i : i + 1], math.inf) for i in positions]
    norms = torch.stack(alone).double().norm(dim=1)
    clip = norms.median().item()
    clipped = [sum_of(model, films, positions[i : i + 1], clip) for i in positions]
    for whole, part, norm in zip(alone, clipped, norms, strict=True):
        expected = whole * min(1.0, clip / norm.item())
        assert (part - expected).norm() <= 1e-5 * clip
    together = sum_of(model, films, positions, clip)
    assert (together - torch.stack(clipped).sum(0)).norm() <= 5 * clip * ROUNDING


def test_a_gradient_that_is_not_finite_counts_as_zero(films):
    model, positions = build("layer4,fc"), np.arange(6)
    others = sum_of(model, films, np.delete(positions, 3), 0.1)
    films.labels[3] = 1e38  # its loss has no gradient in float32
    assert (sum_of(model, films, positions, 0.1) - others).norm() <= 0.6 * ROUNDING
    assert not sum_of(model, films, positions[3:4], 0.1).any()


def test_norms_that_cancel_are_not_taken_for_smaller_ones():
    """Of positions whose products are 1e6 times their sum; else such a patient was not clipped."""
    torch.manual_seed(0)
    layer, films = nn.Conv2d(64, 64, 1, bias=False), torch.randn(3, 64, 1, 1)
    windows, back = torch.cat([films, films], 3), torch.randn(3, 64, 1, 1) * 1e3
    back = torch.cat([back, -back * (1 + 1e-6)], 3)
    exact = torch.einsum("bopq,bipq->boi", back.double(), windows.double()).flatten(1).norm(dim=1)
    (found,) = convolution_norms(layer, [windows], back).values()
    assert (found / exact - 1).abs().max() < 1e-2


def test_gradients_in_parts_are_the_gradients_at_once(films, monkeypatch):
    model, positions = build(), np.arange(12)
    whole = sum_of(model, films, positions, 0.1)
    monkeypatch.setattr(gradients, "AT_ONCE", 5)
    parts = sum_of(model, films, positions, 0.1)
    assert (parts - whole).norm() <= ROUNDING * whole.norm()


def test_a_step_without_patients_is_noise_alone(films):
    assert not sum_of(build(), films, np.array([], dtype=int), 1.0).any()


# Sampling.


def test_patients_are_drawn_on_their_own_with_the_stated_chance(films):
    """Poisson sampling: the number drawn is binomial, and no patient depends on another."""
    patients = [np.array([2 * i, 2 * i + 1]) for i in range(20)]
    rng = generator(0, "test")
    drawn = np.zeros((4000, 20))
    for row in drawn:
        row[draw_films(patients, 0.3, rng) // 2] = 1
    counts = drawn.sum(axis=1)
    assert abs(drawn.mean(axis=0) - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert counts.var() == pytest.approx(20 * 0.3 * 0.7, rel=0.12)  # a fixed size would have none
    assert abs(np.corrcoef(drawn.T) - np.eye(20)).max() < 5 / math.sqrt(4000)


def test_a_patient_with_many_films_counts_like_one_with_one_film():
    patients = [np.arange(100), np.array([100])]
    rng = generator(0, "test")
    drawn = [draw_films(patients, 0.5, rng) for _ in range(2000)]
    counts = [sum((d < 100).sum() for d in drawn), sum((d == 100).sum() for d in drawn)]
    assert all(abs(count - 1000) < 5 * math.sqrt(500) for count in counts)
    assert max((d < 100).sum() for d in drawn) == 1  # one film a step, never two
    assert len({int(i) for d in drawn for i in d[d < 100]}) == 100  # each film has its turn


# Noise.


@pytest.mark.parametrize("draw", [generator(0, "noise"), SystemRandomness()])
def test_noise_is_normal_and_has_the_stated_scale(draw):
    noise = add_noise(torch.zeros(200, 100), 1.7, draw).flatten().numpy() / 1.7
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert noise.std() == pytest.approx(1, abs=5 / math.sqrt(2 * noise.size))


def test_each_step_adds_noise_of_multiplier_times_clip(tmp_path, films):
    """With a learning rate of 1 and gradients clipped to nothing, a step is the noise."""
    settings = {"noise_multiplier": 2.0, "clip": 1e-3, "batch_size": 64} | SGD | {"lr": 1.0}
    client, model = private_client(tmp_path, films, **settings), build()
    sent = to_cpu(model.tracked_state())
    update, _ = client.fit(model, sent, {}, 1)
    moved = (update.state["fc.weight"] - sent["fc.weight"]).flatten() * len(client.patients)
    assert client.steps == 1
    assert moved.std().item() == pytest.approx(2e-3, rel=0.05)


def test_with_a_huge_clip_and_no_noise_a_step_is_plain_sgd_on_the_same_batch(
    tmp_path, films, monkeypatch
):
    """Each step, from where it began, against float64: steps in a row would enlarge roundings."""
    weights, tracked = [], "layer1,layer2,fc"

    def watched(parameters, settings):
        optimizer = make_optimizer(parameters, settings)
        optimizer.register_step_post_hook(lambda *_: weights.append(to_cpu(model.tracked_state())))
        return optimizer

    monkeypatch.setattr(private, "make_optimizer", watched)
    monkeypatch.setattr(gradients, "add_noise", lambda total, deviation, draw: total)
    client = private_client(tmp_path, films, clip=1e9, tracked=tracked, augment="false", **SGD)
    model = smooth(build(tracked))
    sent = to_cpu(model.tracked_state())
    update, _ = client.fit(model, sent, {}, 1)
    assert len(weights) == client.steps == 2
    assert all(torch.equal(value, weights[-1][name]) for name, value in update.state.items())

    plain, rng = smooth(build(tracked)).double(), generator(0, "privacy", 1, "client-1")
    trained = freeze_batchnorm(plain)
    assert update.state.keys() == trained.keys()
    for before, after in itertools.pairwise([sent, *weights]):
        plain.load(before)
        pixels, labels = films.batch(draw_films(client.patients, client.rate, rng))
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            plain(normalise(pixels).double()), labels.double(), reduction="none"
        )
        exact = torch.autograd.grad(losses.mean(dim=1).sum() / 8, list(trained.values()))
        for name, gradient in zip(trained, exact, strict=True):
            step = 0.1 * gradient
            error = (after[name] - (before[name] - step)).norm()
            storing = torch.finfo(torch.float32).eps * before[name].norm()
            assert error <= ROUNDING * step.norm() + storing, name
            assert step.norm() > 100 * storing, name


def test_seeded_noise_repeats_and_secure_noise_does_not(tmp_path, films):
    model = build()
    sent = to_cpu(model.tracked_state())

    def weights(**changes):
        return (
            private_client(tmp_path, films, **changes).fit(model, sent, {}, 1)[0].state["fc.bias"]
        )

    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(secure="true"), weights(secure="true"))


def test_with_secure_nothing_private_comes_from_the_seed(tmp_path, films, monkeypatch):
    """Patients, films, augmentation and noise: all from the system, augmentation by patient."""
    client, model = private_client(tmp_path, films, secure="true", augment="true"), build()
    drawn, used = [], []

    def refuse(*about):
        raise AssertionError(f"the public seed decides about {about[1:]}")

    def watched(rng, count):
        drawn.append((type(rng), draw_motion(rng, count)))
        return drawn[-1][1]

    def summed(hooked, films, positions, clip, motion):
        used.append((positions, motion))
        return clipped_sum(hooked, films, positions, clip, motion)

    for module in (private, gradients):
        monkeypatch.setattr(module, "generator", refuse, raising=False)
    monkeypatch.setattr("fedutils.client.generator", refuse)
    monkeypatch.setattr(private, "draw_motion", watched)
    monkeypatch.setattr(gradients, "clipped_sum", summed)
    update, _ = client.fit(model, to_cpu(model.tracked_state()), {}, 1)
    assert update.status == "ok" and len(drawn) == client.steps
    names = films.index["patient_id"].tolist()
    for (kind, motion), (positions, moved) in zip(drawn, used, strict=True):
        assert kind is SystemRandomness and motion.shape == (3, len(client.patients))
        owners = [sorted(set(names)).index(names[k]) for k in positions]
        assert np.array_equal(moved, motion[:, owners])


@pytest.mark.parametrize("deviation", [1.7, 1e-3, 64.0])
def test_what_is_released_lies_on_one_grid_whatever_the_sum(deviation):
    """In float32 3.8 to 15.5 % of what one sum gives cannot come of another: the gaps tell."""
    sums = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0)) * deviation
    step = 2.0 ** math.floor(math.log2(deviation) - 16)
    for total in sums:
        released = add_noise(total, deviation, SystemRandomness()).double()
        assert torch.equal((released / step).round() * step, released)
        assert not torch.equal((total.double() / step).round() * step, total.double())
        noise = (released - total.double()) / deviation
        assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


# What leaves the hospital, and what stays.


def test_only_trained_parameters_leave_with_neither_loss_nor_film_count(tmp_path, films):
    model = build("layer2,fc")
    before = to_cpu(model.state_dict())
    update, kept = private_client(tmp_path, films, tracked="layer2,fc").fit(
        model, to_cpu(model.tracked_state()), {}, 1
    )
    assert not any("bn" in k or "running" in k or "num_batches" in k for k in update.state)
    assert (
        "layer2.0.conv1.weight" in update.state and "layer2.0.downsample.0.weight" in update.state
    )
    assert math.isnan(update.train_loss) and update.examples == 1
    assert list(kept) == [STEPS]
    for name, value in model.state_dict().items():
        if name not in update.state:
            assert torch.equal(value, before[name]), name


def test_what_a_hospital_looks_for_is_what_its_data_declare_whatever_its_labels(tmp_path, films):
    """In the mean's rows it counts by a public list: one label more or less changes nothing there."""
    report = tmp_path / "prepared/report.json"
    films.index["source"] = np.where(films.index["patient_id"] == "p0", "south", "north")
    told = {"north": FINDINGS[:3], "south": [FINDINGS[5]], "west": FINDINGS[8:]}
    report.write_text(json.dumps({"declared": told}))
    declared = [1, 1, 1, 0, 0, 1] + [0] * 8
    assert private_client(tmp_path, films).known == declared
    films.labels[:, 0] = np.nan
    assert private_client(tmp_path, films).known == declared
    report.write_text("{}")
    with pytest.raises(InputError, match="older fedutils prepared these films: run notebook 02"):
        _ = private_client(tmp_path, films).known
    report.unlink()
    films.store = None  # a run is planned, maybe before notebook 02
    assert private_client(tmp_path, films).known == [0] + [1] * 13


def test_the_model_is_left_without_hooks(tmp_path, films):
    model = build()
    private_client(tmp_path, films).fit(model, to_cpu(model.tracked_state()), {}, 1)
    assert not model.fc._forward_hooks and not model.fc._backward_hooks
    assert not hasattr(model.fc.weight, "grad_sample")


def test_the_budget_is_kept_from_round_to_round(tmp_path, films):
    client, model = private_client(tmp_path, films), build()
    sent, kept = to_cpu(model.tracked_state()), {}
    for round in (1, 2, 3):
        update, kept = client.fit(model, sent, kept, round)
        expected = epsilon(1.0, client.rate, round * client.steps, 1e-5)
        assert update.epsilon == client.account(kept)["epsilon"] == expected > 0
    assert client.rate == 8 / len(client.patients) and client.steps == 2


def test_batchnorm_that_is_not_frozen_is_refused(tmp_path, films):
    model = build_resnet34("none", "layer4,fc", "average", outputs=14)
    with pytest.raises(InputError, match="batchnorm=frozen"):
        private_client(tmp_path, films).fit(model, to_cpu(model.tracked_state()), {}, 1)


def test_a_delta_of_one_in_the_number_of_patients_is_refused(tmp_path, films):
    with pytest.raises(InputError, match="delta"):
        private_client(tmp_path, many_films(tmp_path, 240), delta=0.01)


# Rounds.


def train(work, **changes):
    return Training(tiny_settings(work, **DP | changes), many_films(work)).train()


def last_of(history):
    return history[history["client"] == ""].iloc[-1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A private run of three rounds: its work folder and its history."""
    work = tmp_path_factory.mktemp("straight")
    return work, train(work, rounds=3, name="straight")


def test_a_private_run_withholds_losses_weighs_alike_and_shows_epsilon_each_round(straight):
    history = straight[1]
    clients, model = history[history["client"] != ""], history[history["client"] == ""]
    assert (history["status"] == "ok").all() and history["train_loss"].isna().all()
    assert (clients["examples"] == 1).all() and model["val_auroc"].notna().all()
    worst = clients.groupby("round")["epsilon"].max().tolist()
    assert model["epsilon"].tolist() == worst and worst[0] < worst[1] < worst[2]
    assert (clients["bytes_up"] == 4 * 14 * 513).all()


def test_the_aggregate_is_the_plain_mean_whatever_the_number_of_films(tmp_path, monkeypatch):
    sent, fit = [], Client.fit

    def spy(self, *args):
        update, kept = fit(self, *args)
        sent.append(update.state["fc.bias"])
        return update, kept

    monkeypatch.setattr(Client, "fit", spy)
    films = many_films(tmp_path)
    films.index.loc[films.index["client"] == "client-3", "split"] = "test"
    films.index.loc[films.index.index[-3:], ["client", "split"]] = ["client-3", "train"]
    Training(tiny_settings(tmp_path, rounds=1, **DP), films).train()
    state = load_file(tmp_path / "runs/run/models/federated-s0.safetensors")
    assert len(sent) == 3 and torch.allclose(state["fc.bias"], torch.stack(sent).mean(0), atol=1e-7)


def test_a_resumed_run_keeps_its_budget_exactly(straight):
    work, history = straight
    train(work, rounds=1, name="parts")
    resumed = train(work, rounds=3, name="parts")
    assert resumed.drop(columns="seconds").equals(history.drop(columns="seconds"))
    tables = [(work / f"runs/{name}/privacy.csv").read_text() for name in ("straight", "parts")]
    assert tables[0] == tables[1]


def test_anyone_can_compute_epsilon_again_from_what_the_run_wrote(tmp_path):
    history = train(tmp_path, arms="federated,centralised,local", rounds=1)
    table = pd.read_csv(tmp_path / "runs/run/privacy.csv").fillna({"client": ""})
    assert len(table) == 3 + 1 + 3
    for row in table.itertuples():
        again = epsilon(row.noise_multiplier, row.sampling_rate, row.steps, row.delta)
        assert again == pytest.approx(row.epsilon, rel=1e-12)
    written = table.groupby("arm")["epsilon"].max()
    assert written.to_dict() == history.groupby("arm")["epsilon"].max().to_dict()


def test_a_run_stops_before_the_round_that_would_exceed_its_budget(straight, capsys):
    work, free = straight
    second, third = last_of(free[free["round"] == 2])["epsilon"], last_of(free)["epsilon"]
    target = (second + third) / 2
    history = train(work, rounds=9, name="capped", target_epsilon=target)
    row = last_of(history)
    assert row["round"] == 2 and row["epsilon"] == second < target
    assert f"beyond target_epsilon={target:g}" in row["reason"]
    assert row["reason"] in capsys.readouterr().out
    assert (work / "runs/capped/finished.json").is_file()
    again = train(work, rounds=12, name="capped", target_epsilon=target)
    assert again.equals(history)


def test_a_budget_too_small_for_one_round_is_refused(tmp_path):
    with pytest.raises(InputError, match="not even one round"):
        train(tmp_path, target_epsilon=0.01)


def test_a_target_alone_sets_the_noise_so_that_all_rounds_fit(tmp_path):
    history = train(tmp_path, noise_multiplier=0.0, target_epsilon=6.0, batch_size=64)
    assert 5.9 < last_of(history)["epsilon"] <= 6.0 and last_of(history)["round"] == 2
    with pytest.raises(InputError, match="rounds=2"):  # the noise was chosen for two rounds
        train(tmp_path, noise_multiplier=0.0, target_epsilon=6.0, batch_size=64, rounds=3)


def test_an_update_that_is_left_out_is_paid_for_all_the_same(tmp_path, monkeypatch):
    fit = PrivateClient.fit

    def late(self, *args):
        update, kept = fit(self, *args)
        object.__setattr__(update, "seconds", 999.0 if self.name == "client-2" else 0.0)
        return update, kept

    monkeypatch.setattr(PrivateClient, "fit", late)
    history = train(tmp_path, client_seconds=500.0)
    row = history[history["client"] == "client-2"]
    assert row["status"].tolist() == ["late", "late"]
    table = pd.read_csv(tmp_path / "runs/run/privacy.csv").set_index("hospital")
    assert table["steps"]["client-2"] == table["steps"]["client-1"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchnorm": "average"}, "dp=patient wants batchnorm=frozen, not 'average'"),
        ({"noise_multiplier": 0.0}, "target_epsilon or noise_multiplier"),
        ({"dp": "off"}, "noise_multiplier=1.0 means nothing with dp='off': it wants dp=patient"),
        ({"dp": "film"}, "allowed are off, patient"),
        ({"strategy": "scaffold"} | SGD, "scaffold"),
        ({"secure": "yes"}, "expected true or false"),
    ],
)
def test_a_run_that_would_be_less_private_than_it_says_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tiny_settings(tmp_path, **DP | changes)


# The ledger.


def totals(work, name):
    return pd.read_csv(work / f"runs/{name}/privacy.csv").groupby("hospital")["total_epsilon"].max()


def test_several_releases_cost_what_the_accountant_says_of_them_together(tmp_path):
    """As Opacus composes them: one model, three seeds, three arms of three seeds."""
    from opacus.accountants import RDPAccountant

    found = {}
    for name, more in {
        "one": {}, "seeds": {"seeds": "0,1,2"},
        "arms": {"seeds": "0,1,2", "arms": "federated,centralised,local"},
    }.items():  # fmt: skip
        work = tmp_path / name
        train(work, rounds=1, name="run", **more)
        table, found[name] = pd.read_csv(work / "runs/run/privacy.csv"), totals(work, "run")
        mine = table[table["hospital"].isin(["client-1", "all"])]
        accountant = RDPAccountant()
        accountant.history = [
            (r.noise_multiplier, r.sampling_rate, r.steps) for r in mine.itertuples()
        ]
        assert found[name]["client-1"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert found["one"]["client-1"] < found["seeds"]["client-1"] < found["arms"]["client-1"]


def test_an_adopted_model_is_paid_for_once_and_named_as_adopted(tmp_path, capsys):
    first = train(tmp_path, rounds=1, name="first")
    second = train(tmp_path, rounds=1, name="second", arms="federated,centralised")
    assert "federated-s0: adopted from run first" in capsys.readouterr().out
    assert (second[second["arm"] == "federated"]["reason"] == "adopted from run first").all()
    assert (first["reason"] == "").all() and len(Ledger(tmp_path).read()) == 3 + 1
    assert adopted_models(tmp_path / "runs/second") == {"federated-s0": "first"}


@pytest.mark.parametrize("secure", ["true", "false"])
def test_a_round_that_failed_below_min_clients_is_paid_for(tmp_path, monkeypatch, secure):
    """With noise from the system each try is a release; from the seed it is the same one again."""
    settings = {"rounds": 2, "name": "run", "secure": secure, "min_clients": 3}
    fit = PrivateClient.fit

    def broken(self, *about):
        if self.name == "client-3":
            raise OSError("no power")
        return fit(self, *about)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateClient, "fit", broken)
        for _ in range(3):
            with pytest.raises(FederationError):
                train(tmp_path, **settings)
    train(tmp_path, **settings)
    table = pd.read_csv(tmp_path / "runs/run/privacy.csv").set_index("hospital")
    tries = 3 if secure == "true" else 0
    expected = {"client-1": 2 + tries, "client-2": 2 + tries, "client-3": 2}  # one step a round
    assert table["steps"].to_dict() == expected
    again = epsilon(1.0, table["sampling_rate"]["client-1"], 2 + tries, 1e-5)
    assert table["epsilon"]["client-1"] == table["total_epsilon"]["client-1"] == again


def test_a_model_without_privacy_in_the_folder_makes_the_total_infinite(tmp_path):
    open_run = {"dp": "off", "noise_multiplier": 0.0}
    train(tmp_path, rounds=1, name="open", arms="local", **open_run)
    train(tmp_path, rounds=1, name="private")
    assert np.isinf(totals(tmp_path, "private")).all()
    said = " ".join(privacy_words(tiny_settings(tmp_path, name="private", **DP)))
    assert "inf at client-1" in said and "models without privacy learned from them" in said
    with pytest.raises(InputError, match="beyond total_epsilon"):
        train(tmp_path, rounds=1, name="more", total_epsilon=50.0)


def test_a_run_that_would_exceed_the_total_is_refused_before_it_starts(tmp_path, monkeypatch):
    train(tmp_path, rounds=1, name="first")
    spent = totals(tmp_path, "first").max()
    monkeypatch.setattr(PrivateClient, "fit", lambda *_: pytest.fail("it has begun"))
    limit = {"total_epsilon": 1.05 * spent, "rounds": 1}
    with pytest.raises(InputError, match=r"client-\d to epsilon .* beyond total_epsilon"):
        train(tmp_path, name="second", seeds="1", **limit)
    train(tmp_path, name="same", **limit)  # the same model is no new release


def test_a_ledger_that_cannot_be_read_stops_all_releases(tmp_path):
    train(tmp_path, rounds=1, name="first")
    (tmp_path / "privacy/ledger.json").write_text("{")
    with pytest.raises(InputError, match=r"ledger\.json cannot be read"):
        train(tmp_path, rounds=1, name="second", seeds="1")


def test_an_adopted_private_model_says_what_it_promises(tmp_path):
    train(tmp_path, rounds=1, name="first")
    train(tmp_path, rounds=1, name="second")
    said = [privacy_words(tiny_settings(tmp_path, name=name, **DP)) for name in ("first", "second")]
    assert said[0] == said[1] and "Differential privacy of each training patient" in said[0][0]
    (tmp_path / "runs/second/privacy.csv").unlink()
    with pytest.raises(InputError, match=r"privacy\.csv is missing"):
        privacy_words(tiny_settings(tmp_path, name="second", **DP))


def test_at_the_end_every_model_of_a_hospital_states_the_same_total(tmp_path):
    train(tmp_path, rounds=1, name="run", arms="federated,centralised,local", seeds="0,1")
    table = pd.read_csv(tmp_path / "runs/run/privacy.csv")
    assert table.groupby("hospital")["total_epsilon"].nunique().max() == 1
    assert table.groupby("hospital")["total_epsilon"].first().round(9).nunique() == 1


@pytest.mark.parametrize("damage", ["[]", '["1"'])
def test_a_ledger_whose_list_of_patients_is_not_what_was_written_stops_all(tmp_path, damage):
    train(tmp_path, rounds=1, name="first")
    path = next((tmp_path / "privacy").glob("patients-*.json"))
    path.write_text(damage)
    with pytest.raises(InputError, match="missing or damaged: nothing is released"):
        train(tmp_path, rounds=1, name="second", seeds="1", total_epsilon=100.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf: allowed is 0 to 10000"),
        ({"clip": math.inf}, "clip=inf"), ({"lr": math.inf}, "lr=inf"),
        ({"noise_multiplier": 0.0, "target_epsilon": 1e-6}, "no noise keeps .* steps within it"),
    ],
)  # fmt: skip
def test_extreme_parameters_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path, rounds=1, **changes)


def test_an_own_strategy_that_bears_no_noise_is_refused(tmp_path):
    class Own(Scaffold):
        pass

    settings = tiny_settings(tmp_path, **DP | SGD)
    with pytest.raises(InputError, match="dp=patient: Own is not supported"):
        Training(settings, tiny_films(tmp_path), Own)


def test_a_mechanism_that_withholds_the_loss_shows_none_in_the_simulation(tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "withholds_loss", True)
    history = Training(tiny_settings(tmp_path, rounds=1), tiny_films(tmp_path)).train()
    assert history["train_loss"].isna().all() and (history["status"] == "ok").all()


@pytest.mark.parametrize("steps", [1, 5])
def test_local_steps_are_what_is_taken_and_what_is_paid_for(tmp_path, films, steps, monkeypatch):
    client = private_client(tmp_path, films, local_steps=steps)
    client.halfway = "it keeps no progress: noise that was drawn is not drawn again"
    taken, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda s, *a: (taken.append(1), step(s))[1])
    model = build()
    update, kept = client.fit(model, to_cpu(model.tracked_state()), {}, 1)
    assert len(taken) == steps == int(kept[STEPS]) == client.account(kept)["steps"]
    assert update.epsilon == epsilon(1.0, client.rate, steps, 1e-5)
