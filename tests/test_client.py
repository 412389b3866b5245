"""Local training: what a client computes, sends and keeps."""

import math

import numpy as np
import pytest
import torch
from tiny import ROUNDING, tiny_films, tiny_settings
from torch.nn import functional as F

from fedutils.base.rng import generator
from fedutils.base.state import to_cpu
from fedutils.client import Client, make_optimizer, masked_loss, predict
from fedutils.dataset import IMAGENET_MEAN, IMAGENET_STD
from fedutils.model import build_resnet34
from fedutils.strategies import VARIATE
from fedutils.training import halfway


@pytest.fixture
def films(tmp_path):
    dataset = tiny_films(tmp_path)
    return dataset.where(dataset.index["split"] == "train")


def start_state(model):
    return to_cpu(model.tracked_state())


def test_one_client_equals_an_independent_training_loop_bit_for_bit(tmp_path, films):
    """The loop below is written from the textbook and shares only the batches with ours."""
    torch.set_num_threads(1)
    settings = tiny_settings(tmp_path, local_epochs=2, tracked="all", augment=False)
    client = Client("client-1", films, settings, seed=3)
    model = build_resnet34("none", "all", seed=3, outputs=14)
    update, _ = client.fit(model, start_state(model), {}, round=1)

    plain = build_resnet34("none", "all", seed=3, outputs=14)
    plain.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    rng = generator(3, "shuffle", 1, "client-1")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    losses = []
    for _ in range(2):
        for positions in np.array_split(rng.permutation(len(films)), math.ceil(len(films) / 8)):
            pixels = np.stack([films[int(i)][0].numpy() for i in positions])
            target = torch.stack([films[int(i)][1] for i in positions])
            inputs = (torch.from_numpy(pixels).float() / 255 - mean) / std
            logits = plain(inputs.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(positions)
    for name, value in plain.state_dict().items():
        assert torch.equal(update.state[name], value), name
    assert update.train_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert update.examples == len(films)


def test_frozen_trunk_stays_bit_identical(tmp_path, films):
    settings = tiny_settings(tmp_path, tracked="layer4,fc")
    model = build_resnet34("none", "layer4,fc", outputs=14)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    update, _ = Client("client-1", films, settings, seed=0).fit(model, start_state(model), {}, 1)
    for name, value in model.state_dict().items():
        if not name.startswith(("layer4.", "fc.")):
            assert torch.equal(value, before[name]), name
    assert update.state.keys() == {k for k in before if k.startswith(("layer4.", "fc."))}
    moved = [k for k, v in update.state.items() if not torch.equal(v, before[k])]
    assert "layer4.0.bn1.running_mean" in moved and "fc.weight" in moved


def test_fit_depends_on_seed_round_and_client_only(tmp_path, films):
    settings, model = tiny_settings(tmp_path), build_resnet34("none", "all", outputs=14)
    sent = start_state(model)

    def fit(name, seed, round):
        return Client(name, films, settings, seed).fit(model, sent, {}, round)[0].state["fc.bias"]

    first = fit("a", 0, 1)
    torch.rand(7), np.random.random(3)  # noqa: NPY002 global random state must not matter
    assert torch.equal(fit("a", 0, 1), first)
    for other in (("b", 0, 1), ("a", 1, 1), ("a", 0, 2)):
        assert not torch.equal(fit(*other), first)


def test_masked_loss_ignores_unknown_labels():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    labels = torch.tensor([[1.0, math.nan], [0.0, 1.0]])
    known = F.binary_cross_entropy_with_logits(logits[~labels.isnan()], labels[~labels.isnan()])
    assert torch.allclose(masked_loss(logits, labels), known)
    assert masked_loss(logits, torch.full((2, 2), math.nan)) == 0


def test_fedprox_with_mu_zero_is_fedavg_and_pulls_to_the_start_otherwise(tmp_path, films):
    model = build_resnet34("none", "fc", outputs=14)
    sent = start_state(model)

    def distance(**changes):
        settings = tiny_settings(tmp_path, tracked="fc", local_epochs=3, lr=0.01, **changes)
        state = Client("a", films, settings, 0).fit(model, sent, {}, 1)[0].state
        return sum((state[k] - sent[k]).square().sum().item() for k in state), state

    _, plain = distance()
    _, zero = distance(strategy="fedprox", mu=0.0)
    assert all(torch.equal(plain[k], zero[k]) for k in plain)
    assert distance(strategy="fedprox", mu=10.0)[0] < distance(strategy="fedprox", mu=0.1)[0]


def test_fedprox_step_equals_a_hand_computed_one(tmp_path, films):
    """SGD, one batch and one earlier step: w2 = w1 - lr (g1 + mu (w1 - w0))."""
    values = dict(strategy="fedprox", optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1)
    settings = tiny_settings(
        tmp_path, tracked="fc", mu=0.5, local_epochs=2, batch_size=64, augment=False, **values
    )
    client = Client("a", films, settings, 0)
    model = build_resnet34("none", "fc", outputs=14)
    sent = start_state(model)
    got = client.fit(model, sent, {}, 1)[0].state["fc.bias"]
    model.load(sent)
    weights = sent["fc.bias"].clone()
    for _ in range(2):
        model.zero_grad()
        pixels, labels = films.batch(np.arange(len(films)))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        masked_loss(model((pixels / 255 - mean) / std), labels).backward()
        with torch.no_grad():
            for name in ("weight", "bias"):
                parameter = getattr(model.fc, name)
                pull = 0.5 * (parameter - sent[f"fc.{name}"])
                parameter -= 0.1 * (parameter.grad + pull)
        weights = model.fc.bias.detach()
    assert torch.allclose(got, weights, atol=1e-6)


def test_scaffold_sends_and_keeps_its_variate(tmp_path, films):
    plain_sgd = dict(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1, strategy="scaffold")
    settings = tiny_settings(tmp_path, tracked="fc", **plain_sgd)
    model = build_resnet34("none", "fc", outputs=14)
    sent = start_state(model)
    server = {VARIATE + k: torch.full_like(v, 0.01) for k, v in sent.items()}
    update, kept = Client("a", films, settings, 0).fit(model, sent | server, {}, 1)
    steps = math.ceil(len(films) / 8)
    for name in ("fc.weight", "fc.bias"):
        expected = (sent[name] - update.state[name]) / (steps * 0.1) - server[VARIATE + name]
        assert torch.allclose(kept[VARIATE + name], expected)
        assert torch.equal(update.state[VARIATE + name], kept[VARIATE + name])
    again, kept2 = Client("a", films, settings, 0).fit(model, sent | server, kept, 2)
    change = kept2[VARIATE + "fc.bias"] - kept[VARIATE + "fc.bias"]
    assert torch.allclose(again.state[VARIATE + "fc.bias"], change)


def test_local_batchnorm_never_leaves_the_client(tmp_path, films):
    settings = tiny_settings(tmp_path, tracked="layer4,fc", batchnorm="local")
    model = build_resnet34("none", "layer4,fc", "local", outputs=14)
    local = model.local_names()
    sent = {k: v for k, v in start_state(model).items() if k not in local}
    update, kept = Client("a", films, settings, 0).fit(model, sent, {}, 1)
    assert "layer4.0.bn1.weight" in kept and "layer4.0.bn1.running_var" in kept
    assert kept.keys() == local and not update.state.keys() & local
    model.load({k: torch.zeros_like(v) for k, v in kept.items()})  # another client was here since
    same, _ = Client("a", films, settings, 0).fit(model, sent, kept, 1)
    other, _ = Client("a", films, settings, 0).fit(model, sent, kept, 1)
    assert torch.equal(same.state["fc.weight"], other.state["fc.weight"])


def test_frozen_batchnorm_keeps_the_trunks_statistics(tmp_path, films):
    model = build_resnet34("none", "layer4,fc", "frozen", outputs=14)
    before = to_cpu(model.state_dict())
    settings = tiny_settings(tmp_path, tracked="layer4,fc", batchnorm="frozen")
    update, _ = Client("a", films, settings, 0).fit(model, start_state(model), {}, 1)
    for name, value in update.state.items():
        assert torch.equal(value, before[name]) == ("running" in name or "num_batches" in name)


def test_predict_returns_logits_in_order_whatever_the_batch_size(films):
    model = build_resnet34("none", "all", outputs=14)
    small, large = predict(model, films, 7), predict(model, films, 64)
    assert small.shape == large.shape == (len(films), 14)
    assert (
        np.linalg.norm(small - large, axis=1).max()
        <= ROUNDING * np.linalg.norm(large, axis=1).min()
    )
    assert not model.training and predict(model, films.where(films.labels[:, 0] > 2)).shape == (
        0,
        14,
    )


def test_optimisers_are_the_named_ones(tmp_path):
    parameter = [torch.nn.Parameter(torch.ones(1))]
    assert isinstance(make_optimizer(parameter, tiny_settings(tmp_path)), torch.optim.AdamW)
    sgd = make_optimizer(parameter, tiny_settings(tmp_path, optimizer="sgd", momentum=0.5))
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["momentum"] == 0.5


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_lower_precision_trains_close_to_float32_and_leaves_float32_weights(
    tmp_path, films, precision, dtype
):
    """In fp16 through the GradScaler, as on a T4; here on the CPU."""
    settings = tiny_settings(tmp_path, tracked="fc", precision=precision, augment=False)
    model = build_resnet34("none", "fc", precision=precision, outputs=14)
    sent = start_state(model)
    update, _ = Client("a", films, settings, 0).fit(model, sent, {}, 1)
    full = build_resnet34("none", "fc", precision="fp32", outputs=14)
    full.load(model.state_dict() | sent)
    plain = tiny_settings(tmp_path, tracked="fc", precision="fp32", augment=False)
    expected, _ = Client("a", films, plain, 0).fit(full, sent, {}, 1)
    assert update.state["fc.weight"].dtype is torch.float32
    assert not torch.equal(update.state["fc.weight"], expected.state["fc.weight"])
    assert update.train_loss == pytest.approx(expected.train_loss, rel=0.02)
    error = np.linalg.norm(predict(model, films) - predict(full, films))
    step = torch.finfo(dtype).eps  # 36 layers round like a random walk
    assert error <= step * math.sqrt(36) * np.linalg.norm(predict(full, films))


SCAFFOLD = {"strategy": "scaffold", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize("films_here", [36, 12, 3])
def test_local_steps_are_as_many_whatever_the_number_of_films(
    tmp_path, films, monkeypatch, films_here
):
    """Counted where films are read, where a step is taken, and by what SCAFFOLD is told."""
    settings = tiny_settings(tmp_path, tracked="fc", local_steps=7, **SCAFFOLD)
    own = films.where(np.arange(len(films)) < films_here)
    client, counted, seen, taken = Client("a", own, settings, 0), [], [], []
    end, batch, step = client.strategy.end, own.batch, torch.optim.SGD.step
    own.batch = lambda positions, *on: (seen.append(positions), batch(positions, *on))[1]
    client.strategy.end = lambda *about: (counted.append(about[3]), end(*about))[1]
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (taken.append(1), step(self))[1])
    model = build_resnet34("none", "fc", outputs=14)
    update, _ = client.fit(model, start_state(model), {}, round=1)
    assert counted == [7] and len(seen) == len(taken) == 7 and update.examples == films_here
    batches = math.ceil(films_here / 8)
    for start in range(0, 7 - batches + 1, batches):  # each whole pass has each film once
        assert sorted(np.concatenate(seen[start : start + batches])) == list(range(films_here))


def test_as_many_steps_as_epochs_take_are_these_epochs_bit_for_bit(tmp_path, films):
    model = build_resnet34("none", "fc", outputs=14)
    sent, found = start_state(model), []
    for how in ({"local_epochs": 2}, {"local_steps": 2 * math.ceil(len(films) / 8)}):
        settings = tiny_settings(tmp_path, tracked="fc", **how)
        found.append(Client("a", films, settings, 0).fit(model, sent, {}, 1)[0])
    assert all(torch.equal(found[0].state[k], found[1].state[k]) for k in found[0].state)
    assert found[0].train_loss == found[1].train_loss


def test_the_loss_of_local_steps_is_the_mean_over_the_known_labels_seen(tmp_path, films):
    """Of half a pass, in which one film's labels are all unknown, and another's nearly all."""
    films.labels[:3] = math.nan
    films.labels[3:6, :13] = math.nan
    how = {"tracked": "fc", "local_steps": 3, "lr": 1e-12, "augment": False, "batchnorm": "frozen"}
    client = Client("a", films, tiny_settings(tmp_path, **how), 0)
    model = build_resnet34("none", "fc", "frozen", outputs=14)
    update, _ = client.fit(model, start_state(model), {}, 1)
    seen = list(client._batches(1))
    weights = [(~np.isnan(films.labels[one])).mean(axis=1).sum() for one in seen]
    logits, labels = torch.from_numpy(predict(model, films)), torch.from_numpy(films.labels)
    losses = [masked_loss(logits[one], labels[one]).item() for one in seen]
    assert len(seen) == 3
    assert update.train_loss == pytest.approx(np.average(losses, weights=weights), rel=1e-4)


HALFWAY = [
    {},
    {"local_steps": 7},
    {"optimizer": "sgd"},
    {"strategy": "fedprox", "mu": 0.5},
    SCAFFOLD | {"local_steps": 7},
    {"precision": "bf16"},
    {"precision": "fp16"},
]


@pytest.mark.parametrize("changes", HALFWAY, ids=str)
def test_a_round_that_is_killed_after_a_few_steps_goes_on_to_the_same_bits(
    tmp_path, films, monkeypatch, changes
):
    """In another process: nothing is left of the first one but the file."""
    monkeypatch.setattr(halfway, "EVERY", 0.0)
    settings = tiny_settings(tmp_path, tracked="layer1,fc", **changes)

    def place():
        return build_resnet34(
            "none", settings.tracked, outputs=14, precision=settings.precision
        ).place("cpu")

    def start(about="this round"):
        client = Client("a", films, settings, 0)
        client.halfway = halfway.Halfway(tmp_path / "halfway", about)
        return client

    model = place()
    first = Client("a", films, settings, 0)
    first.strategy.parameters = {name for name, _ in model.named_parameters()}
    sent = first.strategy.download(start_state(model), {})
    straight, keeps = first.fit(model, sent, {}, 1)
    batch, left = films.batch, iter([1, 1, 1])

    def killed(*about):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return batch(*about)

    films.batch = killed
    with pytest.raises(KeyboardInterrupt):
        start().fit(model, sent, {}, 1)
    read = []
    films.batch = lambda *about: (read.append(1), batch(*about))[1]
    again, kept = start().fit(place(), sent, {}, 1)
    assert len(read) == len(list(first._batches(1))) - 3
    assert again.train_loss == straight.train_loss
    for one, two in ((again.state, straight.state), (kept, keeps)):
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    read.clear()
    start("another round").fit(place(), sent, {}, 1)
    assert len(read) == len(list(first._batches(1)))


def test_a_damaged_file_of_a_round_costs_time_and_no_bit(tmp_path, films, monkeypatch):
    monkeypatch.setattr(halfway, "EVERY", 0.0)
    settings, model = (
        tiny_settings(tmp_path, tracked="fc"),
        build_resnet34("none", "fc", outputs=14),
    )
    sent = start_state(model)
    straight, _ = Client("a", films, settings, 0).fit(model, sent, {}, 1)
    for damaged in (1, 2):  # the last one, for which there is one before, and both
        client = Client("a", films, settings, 0)
        client.halfway = halfway.Halfway(tmp_path / str(damaged), "a round")
        client.fit(model, sent, {}, 1)
        files = sorted((tmp_path / str(damaged)).glob("round-*"))
        for file in files[-damaged:]:
            content = bytearray(file.read_bytes())
            content[-20] ^= 1
            file.write_bytes(content)
        client.halfway = halfway.Halfway(tmp_path / str(damaged), "a round")
        with pytest.warns(UserWarning, match="checksum does not match"):
            again, _ = client.fit(model, sent, {}, 1)
        assert all(torch.equal(again.state[k], straight.state[k]) for k in sent)


class Overflows:
    """A GradScaler whose first steps overflow: it skips them, and halves its scale each time."""

    def __init__(self, skips):
        self.skips, self.factor = skips, 2.0**16

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        pass

    def step(self, optimizer):
        if not self.skips:
            optimizer.step()

    def update(self):
        if self.skips:
            self.skips, self.factor = self.skips - 1, self.factor / 2

    def get_scale(self):
        return self.factor


def test_scaffold_counts_only_the_steps_that_were_taken(tmp_path, films, monkeypatch):
    about = {"strategy": "scaffold", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    client = Client("client-1", films, tiny_settings(tmp_path, **about), seed=0)
    model, batches = build_resnet34("none", "fc", outputs=14), math.ceil(len(films) / 8)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *about, **more: Overflows(2))
    counted = []
    monkeypatch.setattr(
        client.strategy, "end", lambda *about: (counted.append(about[3]), ({}, {}))[1]
    )
    client.fit(model, start_state(model), {}, round=1)
    assert counted == [batches - 2]
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *about, **more: Overflows(batches))
    with pytest.raises(ValueError, match="every step overflowed"):
        client.fit(model, start_state(model), {}, round=1)
