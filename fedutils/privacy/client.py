"""Differential privacy of patients in each hospital (extra `privacy`).

DP-SGD (Abadi et al., CCS 2016) with the *patient* as its unit: each step draws patients (Poisson:
each with the same chance, on its own), takes one random film of each, clips each one's gradient and
adds Gaussian noise. Neighbours differ by one patient with all films. Patients are at one hospital
only, so a model's epsilon is that of its worst client. Public: the settings and each hospital's
number of patients. Not protected: patients of validation and test, in figures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from ..base.errors import InputError
from ..base.parameters import Parameters, parameter
from ..base.rng import generator
from ..base.state import State
from ..client import Client, Update, make_optimizer
from ..model import ChestResNet
from . import gradients
from .accountant import calibrate_noise, epsilon

STEPS = "privacy/steps"  # in what a client keeps: the steps whose result it has sent, its budget


@dataclass(frozen=True)
class PrivacyParameters(Parameters):
    """Differential privacy of each training patient."""

    dp: str = parameter(
        "off", "differential privacy of each training patient; wants batchnorm=frozen",
        allowed=("off", "patient"),
    )  # fmt: skip
    target_epsilon: float = parameter(
        0.0, "stop before this; without noise_multiplier, noise so that all rounds fit",
        bounds=(0.0, math.inf),
    )  # fmt: skip
    noise_multiplier: float = parameter(
        0.0, "deviation of the noise, in units of clip; 0: from target_epsilon",
        bounds=(0.0, math.inf),
    )  # fmt: skip
    delta: float = parameter(
        1e-5, "chance that the promise of epsilon fails; well below one in the patients",
        bounds=(1e-15, 0.01),
    )  # fmt: skip
    clip: float = parameter(1.0, "largest norm of a patient's gradient", bounds=(1e-12, math.inf))
    secure: bool = parameter(
        False, "noise from the system, not from the seed: what a hospital runs; not repeatable"
    )

    def check(self) -> None:
        """Raise InputError where a run would be less private than it says, or cannot be private."""
        if self.dp == "off":
            asked = ("target_epsilon", "noise_multiplier", "secure")
            for name in [name for name in asked if getattr(self, name)]:
                raise InputError(f"{name}={getattr(self, name)!r} means nothing without dp=patient")
            return
        if not self.target_epsilon and not self.noise_multiplier:
            raise InputError("dp=patient wants target_epsilon or noise_multiplier above 0")
        if self.batchnorm != "frozen":
            what = f"dp=patient wants batchnorm=frozen, not {self.batchnorm!r}"
            raise InputError(f"{what}: BatchNorm mixes the patients of a batch, and tells of them")
        if self.strategy == "scaffold":
            raise InputError("dp=patient: strategy=scaffold is not supported; choose another one")
        if not find_spec("opacus"):
            raise InputError("dp=patient needs Opacus: pip install 'opacus>=1.5'")


class PrivateClient(Client):
    """A hospital that trains with differential privacy for its patients.

    What leaves it: the trained parameters and the number of steps; no buffer, no loss, and each
    client weighs 1. Noise from the seed is a *simulation*: who knows the seed can take it off.
    `secure=true` draws it, and the patients, from the system: no repeatable bits.
    """

    mechanism = "patient"
    withholds_loss = True
    spent = (STEPS,)

    def __init__(self, *about: Any, **more: Any) -> None:
        super().__init__(*about, **more)
        settings = self.settings
        self.weight = 1 if self.films.weight else 0
        positions = self.films.index.groupby("patient_id").indices
        self.patients = [positions[patient] for patient in sorted(positions)]
        self.rate = min(1.0, settings.batch_size / max(1, len(self.patients)))
        self.steps = settings.local_epochs * math.ceil(1 / self.rate)  # of a round
        if settings.delta * len(self.patients) >= 1:
            what = f"delta={settings.delta:g}: {self.name} has {len(self.patients)} patients"
            raise InputError(f"{what}; one in that many allows to publish one of them, choose less")

    @property
    def noise(self) -> float:
        """The noise multiplier: as given, or so that all rounds end within `target_epsilon`."""
        s = self.settings
        planned = self.rate, s.rounds * self.steps
        return s.noise_multiplier or calibrate_noise(s.target_epsilon, s.delta, *planned)

    def account(self, kept: State, more: int = 0) -> dict[str, Any]:
        """Return what this client has spent with what it `kept`, and `more` rounds to come."""
        steps = int(kept.get(STEPS, 0)) + more * self.steps
        return {
            "hospital": self.name,
            "patients": len(self.patients),
            "sampling_rate": self.rate,
            "noise_multiplier": self.noise,
            "steps": steps,
            "delta": self.settings.delta,
            "clip": self.settings.clip,
            "epsilon": epsilon(self.noise, self.rate, steps, self.settings.delta),
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
        """Train as `Client.fit` does, privately, and keep what is spent; wants frozen BatchNorm."""
        gradients.freeze_batchnorm(model)
        update, keep = super().fit(model, sent, kept, round)
        if update.status != "ok":
            return update, keep
        keep[STEPS] = kept.get(STEPS, torch.tensor(0)) + self.steps
        leaves = self.returns(model, sent)
        state = {name: value for name, value in update.state.items() if name in leaves}
        spent = self.account(keep)["epsilon"]
        return replace(update, state=state, epsilon=spent), keep

    @staticmethod
    def returns(model: ChestResNet, sent: State) -> set[str]:
        """Name the tensors of an update: the trained parameters, but no BatchNorm and no buffer."""
        return gradients.freeze_batchnorm(model).keys() & sent.keys()

    def _train(
        self, model: ChestResNet, correct: Callable[[], None], round: int
    ) -> tuple[float, int]:
        """Take the round's steps; return no loss, which would tell of patients, and the steps."""
        model.train()
        trained, settings = gradients.freeze_batchnorm(model), self.settings
        optimizer = make_optimizer(list(trained.values()), settings)
        seeded = generator(self.seed, "privacy", round, self.name)
        draw = gradients.SystemRandomness() if settings.secure else seeded
        rng = generator(self.seed, "augment", round, self.name) if settings.augment else None
        expected = self.rate * len(self.patients)
        with gradients.per_patient_gradients(model) as hooked:
            for _ in range(self.steps):
                films = gradients.draw_films(self.patients, self.rate, draw)
                sums = gradients.clipped_sum(hooked, self.films, films, settings.clip, rng)
                for weight, total in zip(trained.values(), sums, strict=True):
                    noise = gradients.gaussian(total, self.noise * settings.clip, draw)
                    weight.grad = (total + noise) / expected
                correct()
                optimizer.step()
        return math.nan, self.steps
