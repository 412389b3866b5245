"""Differential privacy of patients in each hospital, and an attack that tests it (extra `privacy`).

DP-SGD (Abadi et al., CCS 2016) with the *patient* as its unit. A patient has up to 184 films, so a
promise about a film is none about a person. Here each step draws patients, not films (Poisson: each
with the same chance, on its own), takes one random film of each, clips each patient's gradient and
adds Gaussian noise. Whoever sees all updates of all rounds can then hardly tell whether one
patient, with all films, was there or not: neighbours differ by one patient, more or less. Patients
are at one hospital only, so a model's epsilon is that of its worst client. Public: the settings and
each hospital's number of patients. Not protected: patients of validation and test, in figures.
"""

import functools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .client import Client, Update, make_optimizer
from .findings import InputError
from .images import ChestXrayDataset
from .model import ChestResNet, is_batchnorm
from .rng import generator
from .settings import Settings
from .weights import State

STEPS = "privacy/steps"  # in what a client keeps: the steps whose result it has sent, its budget
GRADIENT_BYTES = 2 << 30  # of gradients by patient at a time; twice that in work fits a T4's 16 GB


class SystemRandomness:
    """The system's randomness in the two calls of a NumPy generator that are used here."""

    def random(self, size: int) -> np.ndarray:
        """Draw `size` numbers between 0 and 1."""
        return (np.frombuffer(os.urandom(8 * size), np.uint64) >> 11) * 2.0**-53

    def standard_normal(self, size: int) -> np.ndarray:
        """Draw `size` normal numbers, of four each, so that a float's gaps tell nothing.

        Holohan and Braghin, ESORICS 2021 (arXiv:2107.10138), section 5.1, with n = 2.
        """
        uniform = torch.from_numpy(self.random(4 * size)) + 2.0**-54
        return torch.special.ndtri(uniform).view(4, size).sum(0).div(2).numpy()


class PrivateClient(Client):
    """A hospital that trains with differential privacy for its patients.

    What leaves it: the trained parameters, the number of steps, nothing else. Each client weighs 1,
    its training loss is withheld, and no buffer travels. The noise is drawn from the seed, which
    is a *simulation*: who knows the seed can take it off. `secure=true` draws it, and the patients,
    from the system instead: no repeatable bits, and what a hospital would run.
    """

    def __init__(self, name: str, films: ChestXrayDataset, settings: Settings, seed: int) -> None:
        super().__init__(name, films, settings, seed)
        self.weight = 1
        positions = films.index.groupby("patient_id", sort=True).indices
        self.patients = [positions[patient] for patient in sorted(positions)]
        self.rate = min(1.0, settings.batch_size / max(1, len(self.patients)))
        self.steps = settings.local_epochs * math.ceil(1 / self.rate)  # of a round
        if settings.delta * len(self.patients) >= 1:
            raise InputError(
                f"delta={settings.delta:g}: {name} has {len(self.patients)} patients; a delta"
                " of one in that many would allow to publish one of them, choose less"
            )

    @property
    def noise(self) -> float:
        """The noise multiplier: as given, or so that all rounds end within `target_epsilon`."""
        s = self.settings
        planned = self.rate, s.rounds * self.steps
        return s.noise_multiplier or calibrate(s.target_epsilon, s.delta, *planned)

    def account(self, kept: State, more: int = 0) -> dict[str, Any]:
        """Return what this client has spent, and what it takes to compute it again.

        `kept` is what it kept at the last round boundary, `more` a number of rounds to come.
        """
        steps = int(kept.get(STEPS, 0)) + more * self.steps
        spent = epsilon(self.noise, self.rate, steps, self.settings.delta)
        return {
            "hospital": self.name,
            "patients": len(self.patients),
            "sampling_rate": self.rate,
            "noise_multiplier": self.noise,
            "steps": steps,
            "delta": self.settings.delta,
            "clip": self.settings.clip,
            "epsilon": spent,
        }

    def over_budget(self, kept: State) -> str:
        """Say why another round is not possible; empty where it is."""
        limit, after = self.settings.target_epsilon, self.account(kept, more=1)
        if not limit or after["epsilon"] <= limit:
            return ""
        return (
            f"stopped: the next round would take {self.name} to epsilon {after['epsilon']:.3f},"
            f" beyond target_epsilon={limit:g}"
        )

    def fit(self, model: ChestResNet, sent: State, kept: State, round: int) -> tuple[Update, State]:
        """Train as `Client.fit` does, privately; the budget that is spent is part of what is kept.

        Raises InputError where BatchNorm is not frozen.
        """
        trained = freeze_batchnorm(model)
        others = {name: value for name, value in kept.items() if name != STEPS}
        update, keep = super().fit(model, sent, others, round)
        keep[STEPS] = kept.get(STEPS, torch.tensor(0)) + self.steps
        state = {name: value for name, value in update.state.items() if name in trained}
        spent = self.account(keep)["epsilon"]
        return replace(update, state=state, epsilon=spent), keep

    def _train(self, model: ChestResNet, start: State, c: State, round: int) -> tuple[float, int]:
        """Take the round's steps; return no loss, which would tell of patients, and the steps."""
        model.train()
        trained, settings = freeze_batchnorm(model), self.settings
        optimizer = make_optimizer(list(trained.values()), settings)
        seeded = generator(self.seed, "privacy", round, self.name)
        draw = SystemRandomness() if settings.secure else seeded
        augment = generator(self.seed, "augment", round, self.name)
        rng = augment if settings.augment else None
        expected = self.rate * len(self.patients)
        with per_patient_gradients(model) as hooked:
            for _ in range(self.steps):
                films = draw_films(self.patients, self.rate, draw)
                sums = clipped_sum(hooked, self.films, films, settings.clip, rng)
                for parameter, total in zip(trained.values(), sums, strict=True):
                    noise = gaussian(total, self.noise * settings.clip, draw)
                    parameter.grad = (total + noise) / expected
                self._correct(trained, start, c)
                optimizer.step()
        return math.nan, self.steps


def freeze_batchnorm(model: nn.Module) -> dict[str, nn.Parameter]:
    """Freeze the affine parameters of all BatchNorm; return what is trained, by name.

    BatchNorm that is not frozen mixes the patients of a batch: then no gradient belongs to one.
    Raises InputError where a tracked layer has some.
    """
    layers = [module for module in model.modules() if is_batchnorm(module)]
    if any(layer.training for layer in layers):
        raise InputError("dp=patient wants batchnorm=frozen: BatchNorm mixes patients of a batch")
    for parameter in (p for layer in layers for p in layer.parameters()):
        parameter.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def draw_films(
    patients: list[np.ndarray], rate: float, draw: np.random.Generator | SystemRandomness
) -> np.ndarray:
    """Draw each patient with chance `rate`, on its own, and one film of each; return positions.

    `patients` holds the positions of each one's films. Two numbers are drawn for each patient,
    drawn or not, so that one patient's films never decide about another's.
    """
    chance, which = draw.random(len(patients)), draw.random(len(patients))
    chosen = [films[int(w * len(films))] for films, w in zip(patients, which, strict=True)]
    return np.array(chosen, dtype=int)[chance < rate]


@contextmanager
def per_patient_gradients(model: ChestResNet) -> Iterator[nn.Module]:
    """Let Opacus (Yousefpour et al., 2021) keep each film's gradient; take its hooks off again.

    All is computed in float32: what is clipped must be the gradient, neither scaled nor rounded.
    """
    wanted, model.precision = model.precision, "fp32"
    hooked = _opacus("grad_sample").GradSampleModule(model, loss_reduction="sum")
    # Opacus' own takes each film for contiguous: of channels_last it makes noise, and no error.
    hooked.GRAD_SAMPLERS = hooked.GRAD_SAMPLERS | {nn.Conv2d: convolution_gradients}
    try:
        yield hooked
    finally:
        hooked.to_standard_module()
        model.precision = wanted


def convolution_gradients(
    layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return each film's gradient, (B, out, in, k, k), of a convolution without groups or bias."""
    how = layer.kernel_size, layer.dilation, layer.padding, layer.stride
    windows = F.unfold(activations[0], *how)  # (B, in k k, positions)
    gradients = torch.einsum("bop,bip->boi", backprops.flatten(2), windows)
    return {layer.weight: gradients.view(-1, *layer.weight.shape)}


def clipped_sum(
    hooked: nn.Module,
    films: ChestXrayDataset,
    positions: np.ndarray,
    clip: float,
    rng: np.random.Generator | None = None,
) -> list[Tensor]:
    """Sum the gradients of one film a patient, each scaled to a norm of at most `clip`.

    A tensor for each trained parameter, of its shape. Films go through the model in parts, so that
    their gradients fit into memory. Without films the sum is zero.
    """
    trained = [p for p in hooked.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in trained]
    size = min(256, max(1, GRADIENT_BYTES // sum(4 * p.numel() for p in trained)))
    for start in range(0, len(positions), size):
        chosen = positions[start : start + size]
        batch, labels = films.batch(chosen, sums[0].device)
        patient_losses(hooked(batch, rng), labels).sum().backward()
        parts = clip_each([p.grad_sample for p in trained], clip)
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)]
        for parameter in trained:
            parameter.grad = parameter.grad_sample = None
    return sums


def patient_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each film (B,), mean over its own known labels; (B, 14) both.

    The mean is not taken over the batch's known labels, as in other training: there, a patient
    would change the weight of all others.
    """
    known = (~labels.isnan()).float()
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), labels.nan_to_num(), known, reduction="none"
    )
    return losses.sum(1) / known.sum(1).clamp(min=1)


def clip_each(gradients: list[Tensor], clip: float) -> list[Tensor]:
    """Scale each patient's gradients, (B, ...) a parameter, to a joint norm of `clip`, and sum.

    A patient whose gradient is not finite counts as zero: that, too, would tell of the patient.
    """
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).double().norm(dim=0)
    broken = ~norms.isfinite()
    if broken.any():
        norms[broken] = 0
        for gradient in gradients:
            gradient[broken] = 0
    factor = (clip / norms).clamp(max=1).float()
    return [(factor @ g.flatten(1)).view(g.shape[1:]) for g in gradients]


def gaussian(
    like: Tensor, deviation: float, draw: np.random.Generator | SystemRandomness
) -> Tensor:
    """Draw Gaussian noise of a tensor's shape, dtype and device."""
    noise = torch.from_numpy(draw.standard_normal(like.numel()) * deviation)
    return noise.view(like.shape).to(like)


def _opacus(module: str) -> Any:
    """Import a part of Opacus at its first use, or say how to get it; its log is left quiet."""
    try:
        found = import_module(f"opacus.{module}")
    except ImportError as error:
        raise InputError("dp=patient needs Opacus: pip install 'opacus>=1.5'") from error
    # It reports each order that its series does not converge for; the bound holds without them.
    logging.getLogger("opacus").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # the trunk's end, as meant
    return found


@functools.lru_cache(maxsize=1024)
def _rdp(noise: float, rate: float) -> np.ndarray:
    """Return the Rényi divergence of one step, at each of the accountant's orders."""
    orders = _opacus("accountants").RDPAccountant.DEFAULT_ALPHAS
    analysis = _opacus("accountants.analysis.rdp")
    return analysis.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return the epsilon at `delta` of `steps` steps, by Opacus' Rényi accountant.

    Mironov, Talwar and Zhang, 2019 (arXiv:1908.10530); neighbours differ by one patient. It equals
    RDPAccountant.get_epsilon, but computes what steps have in common once.
    """
    if not steps or not noise:
        return math.inf if steps else 0.0
    orders = _opacus("accountants").RDPAccountant.DEFAULT_ALPHAS
    analysis = _opacus("accountants.analysis.rdp")
    rdp = steps * _rdp(noise, rate)
    return float(analysis.get_privacy_spent(orders=orders, rdp=rdp, delta=delta)[0])


@functools.lru_cache(maxsize=1024)
def calibrate(target: float, delta: float, rate: float, steps: int) -> float:
    """Return the least noise multiplier with which `steps` stay within `target`, to .01 epsilon."""
    how = {"target_delta": delta, "sample_rate": rate, "steps": steps, "accountant": "rdp"}
    search = _opacus("accountants.utils").get_noise_multiplier
    return search(target_epsilon=target, epsilon_tolerance=min(0.01, target / 100), **how)


def read_budget(run: Path) -> pd.DataFrame:
    """Read `privacy.csv` of a run: a row a model and hospital; empty without privacy."""
    path = run / "privacy.csv"
    if not path.is_file():
        return pd.DataFrame()
    return pd.read_csv(path, dtype={"client": str, "hospital": str}).fillna({"client": ""})


def privacy_words(settings: Settings) -> list[str]:
    """Say in sentences what a run promises its patients, from `privacy.csv` of the run."""
    table = read_budget(settings.run)
    if not len(table):
        return ["No differential privacy: films stayed with their client, but updates can leak."]
    worst = table.loc[table.groupby(["arm", "seed", "client"], sort=False)["epsilon"].idxmax()]
    models = [
        f"{' '.join(filter(None, [row.arm, row.client]))} (seed {row.seed}): epsilon"
        f" {row.epsilon:.2f} at delta {row.delta:g} after {row.steps} steps of {row.hospital}"
        f" ({row.patients:,} patients, sampling rate {row.sampling_rate:.3g}, noise multiplier"
        f" {row.noise_multiplier:.3g}, clip {row.clip:g})."
        for row in worst.itertuples()
    ]
    promise = (
        "Differential privacy of each training patient, all films together, against anyone who sees"
        " every update of every round (DP-SGD in each hospital, Rényi accountant, neighbours differ"
        " by one patient). Patients of the validation and test splits are not protected."
    )
    noise = (
        "The noise came from the system's randomness."
        if settings.secure
        else "The noise was drawn from a seed: a simulation, since who knows the seed can take it"
        " off. A hospital would run secure=true."
    )
    return [promise, *models, noise]
