"""Differential privacy of patients in each hospital (extra `privacy`).

DP-SGD (Abadi et al., CCS 2016) with the *patient* as its unit: each step draws patients (Poisson:
each with the same chance, on its own), takes one random film of each, clips each one's gradient and
adds Gaussian noise. Neighbours differ by one patient with all films. Patients are at one hospital
only, so a model's epsilon is that of its worst client. Public: the settings and each hospital's
number of patients. Not protected: patients of validation and test, and so all that is chosen or
shown by their films, such as the best round, or a learning rate.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.errors import InputError
from ..base.parameters import Parameters, parameter
from ..base.rng import generator
from ..base.state import State
from ..client import Client, Update, make_optimizer
from ..dataset import draw_motion, read_report
from ..model import ChestResNet
from ..strategies import STRATEGIES
from . import gradients
from .accountant import calibrate_noise, epsilon
from .ledger import Ledger, Release

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
        bounds=(0.0, math.inf), only="dp=patient",
    )  # fmt: skip
    noise_multiplier: float = parameter(
        0.0, "deviation of the noise, in units of clip; 0: from target_epsilon",
        bounds=(0.0, 1e4), only="dp=patient",
    )  # fmt: skip
    delta: float = parameter(
        1e-5, "chance that the promise of epsilon fails; well below one in the patients",
        bounds=(1e-15, 0.01), only="dp=patient",
    )  # fmt: skip
    total_epsilon: float = parameter(
        0.0, "refuse a run that would take a hospital's patients beyond this, over all that was"
        " released of them in the work folder; 0: no limit", bounds=(0.0, math.inf), identity=False,
        only="dp=patient",
    )  # fmt: skip
    clip: float = parameter(
        1.0, "largest norm of a patient's gradient", bounds=(1e-12, math.inf), only="dp=patient"
    )
    secure: bool = parameter(
        False, "patients, augmentation and noise from the system, not from the seed: what a"
        " hospital runs; not repeatable", only="dp=patient",
    )  # fmt: skip


class PrivateClient(Client):
    """A hospital that trains with differential privacy for its patients.

    What leaves it: the trained parameters and the number of steps; no buffer, no loss, and each
    client weighs 1. Randomness from the seed is a *simulation*: who knows the seed can take the
    noise off, and the same round again is the same release. `secure=true` draws all of it from the
    system: no repeatable bits, and each time that a round is tried is paid for.
    """

    mechanism = "patient"
    withholds_loss = True
    spent = (STEPS,)

    def __init__(self, *about: Any, **more: Any) -> None:
        super().__init__(*about, **more)
        settings = self.settings
        if not self.strategy.bears_noise:
            name = type(self.strategy).__name__
            raise InputError(f"dp=patient: {name} is not supported; choose another strategy")
        self.weight = 1 if self.films.weight else 0
        films = self.films.index["patient_id"]
        self.names, self.owners = np.unique(films.to_numpy(), return_inverse=True)  # by film
        positions = films.groupby(films).indices
        self.patients = [positions[name] for name in self.names]
        self.ledger: Ledger | None = None
        self.rate = min(1.0, settings.batch_size / max(1, len(self.patients)))
        self.steps = settings.local_steps or settings.local_epochs * math.ceil(1 / self.rate)
        if settings.delta * len(self.patients) >= 1:
            what = f"delta={settings.delta:g}: {self.name} has {len(self.patients)} patients"
            raise InputError(f"{what}; one in that many allows to publish one of them, choose less")

    @classmethod
    def check(cls, settings: Parameters) -> None:
        """Raise InputError where a run would be less private than it says, or cannot be private."""
        if not settings.target_epsilon and not settings.noise_multiplier:
            raise InputError("dp=patient wants target_epsilon or noise_multiplier above 0")
        if settings.batchnorm != "frozen":
            what = f"dp=patient wants batchnorm=frozen, not {settings.batchnorm!r}"
            raise InputError(f"{what}: BatchNorm mixes the patients of a batch, and tells of them")
        if not STRATEGIES[settings.strategy].bears_noise:
            what = f"dp=patient: strategy={settings.strategy} is not supported"
            raise InputError(f"{what}; choose another one")
        if not find_spec("opacus"):
            raise InputError("dp=patient needs Opacus: pip install 'opacus>=1.5'")

    @property
    def known(self) -> list[float]:
        """One for each finding that its data sets say they look for: public, as labels are not.

        Raises InputError where an older notebook 02 did not record them.
        """
        if self.films.store is None:  # it is only planned, maybe before notebook 02
            return [min(count, 1) for count in super().known]
        report = read_report(self.settings.prepared)
        if "declared" not in report:
            raise InputError("an older fedutils prepared these films: run notebook 02 again")
        sources = self.films.index["source"].unique()
        declared = {name for source in sources for name in report["declared"][source]}
        return [int(name in declared) for name in self.films.findings]

    @property
    def noise(self) -> float:
        """The noise multiplier: as given, or so that all rounds end within `target_epsilon`."""
        s = self.settings
        rounds = s.rounds * self.steps
        try:
            return s.noise_multiplier or calibrate_noise(
                s.target_epsilon, s.delta, self.rate, rounds
            )
        except ValueError as error:
            what = f"target_epsilon={s.target_epsilon:g}: no noise keeps {rounds} steps within it"
            raise InputError(f"{what} ({error})") from error

    def keep_ledger(self, work: Path, model: str, always: bool = False) -> None:
        """Write what is released of a model, named by all that it depends on, into a ledger.

        A round that is tried again counts again if `always`, or if it is not repeatable.
        """
        self.ledger, self.key = Ledger(work), f"{model} {self.name}"
        self.recounts = always or self.settings.secure
        self.registered = self.ledger.register(self.names.tolist())
        self.ledger.read()  # damaged, it is found now

    def release(self, steps: int) -> dict[str, Release]:
        """Return this client's entry in the ledger after so many steps."""
        return {self.key: Release(self.noise, self.rate, self.registered, steps)}

    def released(self, kept: State) -> int:
        """Count the steps whose result has left, by what is `kept` and by the ledger."""
        steps = int(kept.get(STEPS, 0))
        before = self.ledger.read().get(self.key) if self.ledger and self.recounts else None
        return max(steps, before.steps) if before else steps

    def planned(self) -> dict[str, Release]:
        """Return the entry after all rounds, or as many as `target_epsilon` allows."""
        limit, steps = self.settings.target_epsilon, self.settings.rounds * self.steps
        while limit and epsilon(self.noise, self.rate, steps, self.settings.delta) > limit:
            steps -= self.steps
        return self.release(steps)

    def account(self, kept: State) -> dict[str, Any]:
        """Return what this client has spent with what it `kept`; `total_epsilon` by the ledger."""
        steps, delta = self.released(kept), self.settings.delta
        spent = epsilon(self.noise, self.rate, steps, delta)
        of_all = self.ledger.total(self.names, delta, self.release(steps)) if self.ledger else spent
        return {
            "hospital": self.name,
            "patients": len(self.patients),
            "sampling_rate": self.rate,
            "noise_multiplier": self.noise,
            "steps": steps,
            "delta": delta,
            "clip": self.settings.clip,
            "epsilon": spent,
            "total_epsilon": of_all,
        }

    def over_budget(self, kept: State) -> str:
        """Say why another round is not possible; empty where it is."""
        limit, after = self.settings.target_epsilon, self.released(kept) + self.steps
        spent = epsilon(self.noise, self.rate, after, self.settings.delta)
        if limit and spent > limit:
            return (
                f"stopped: the next round would take {self.name} to epsilon {spent:.3f}, beyond"
                f" target_epsilon={limit:g}"
            )
        return self.over_total(self.release(after)) if self.ledger else ""

    def over_total(self, planned: Mapping[str, Release]) -> str:
        """Say by how much these releases would exceed `total_epsilon`; empty where they do not."""
        limit, delta = self.settings.total_epsilon, self.settings.delta
        if not limit or (spent := self.ledger.total(self.names, delta, planned)) <= limit:
            return ""
        return (
            f"would take the patients of {self.name} to epsilon {spent:.3f} over all that"
            f" the ledger of their work folder holds, beyond total_epsilon={limit:g}"
        )

    def fit(self, model: ChestResNet, sent: State, kept: State, round: int) -> tuple[Update, State]:
        """Train as `Client.fit` does, privately, and keep what is spent; wants frozen BatchNorm."""
        gradients.freeze_batchnorm(model)
        update, keep = super().fit(model, sent, kept, round)
        if update.status != "ok":
            return update, keep
        keep[STEPS] = torch.tensor(self.released(kept) + self.steps)
        if self.ledger:  # before anything leaves
            self.ledger.write(self.release(int(keep[STEPS])))
        leaves = self.returns(model, sent)
        state = {name: value for name, value in update.state.items() if name in leaves}
        spent = epsilon(self.noise, self.rate, int(keep[STEPS]), self.settings.delta)
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
        draw = gradients.SystemRandomness()
        if not settings.secure:
            draw = generator(self.seed, "privacy", round, self.name)
        expected = self.rate * len(self.patients)
        with gradients.per_patient_norms(model) as hooked:
            for _ in range(self.steps):
                films = gradients.draw_films(self.patients, self.rate, draw)
                motion = None
                if settings.augment:  # drawn for each patient, as the films are
                    motion = draw_motion(draw, len(self.patients))[:, self.owners[films]]
                sums = gradients.clipped_sum(hooked, self.films, films, settings.clip, motion)
                for weight, total in zip(trained.values(), sums, strict=True):
                    noisy = gradients.add_noise(total, self.noise * settings.clip, draw)
                    weight.grad = noisy / expected
                correct()
                optimizer.step()
        return math.nan, self.steps


def refuse_beyond_total(clients: Iterable[Client]) -> None:
    """Raise InputError where all that these clients plan would exceed `total_epsilon`."""
    clients = list(clients)
    planned = {key: entry for client in clients for key, entry in client.planned().items()}
    for reason in filter(None, (client.over_total(planned) for client in clients)):
        raise InputError(f"this run {reason}")
