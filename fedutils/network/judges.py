"""A test over a network: the hospitals judge the kept models, and the server gets sums alone.

They are masked whether or not the updates of the run were: they are small, and counts of few films
must not leave bare. A sum is of all hospitals or of none, since of another set's sum of the same
films the difference would tell of single ones.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import torch

from ..base.files import write_atomic
from ..base.state import State, state_hash
from ..evidence.pooled import (
    Spans,
    Sums,
    draw_shapes,
    grid_shapes,
    plan_of,
    pooled_tables,
    span_shapes,
    spans_of,
)
from ..evidence.tables import POOLED
from ..privacy.masks import MaskFault
from ..rounds import Job
from ..run import read_model
from .masked import MaskedNetwork
from .server import Network

OF_FILMS = {  # what notebook 04 says of films that it never sees
    "release": "hospitals'",
    "source": "Films of hospitals that tested the model where they lie",
    "labels_by": "Labels are as each hospital has them; how they came about, it alone can say.",
}


class Judges(MaskedNetwork):
    """The hospitals of a run that was trained, with or without masks."""

    members: tuple[str, ...] = ()

    def test(self, jobs: list[Job], seconds: float) -> None:
        """Write into the run's `evaluation` what the hospitals' sums say of each job's model.

        Waits so many seconds for all of them. Raises InputError where one does not answer: the same
        command tests again. Not twice, where the same models were tested already.
        """
        folder = self.settings.run / "evaluation"
        states = {job.model: read_model(self.settings.run, job.name) for job in jobs}
        about: dict[str, Any] = {model.name: state_hash(state) for model, state in states.items()}
        path = self.settings.run / POOLED
        if path.is_file() and json.loads(path.read_text())["models"] == about:
            return
        self.members = tuple(Network.gather(self, seconds))
        if len(self.members) < 2:
            print("not tested: a sum of one hospital is bare; notebook 04 tests there", flush=True)
            return
        models = {(m.arm, str(m.seed), ""): self.judge(m.seed, s) for m, s in states.items()}
        evaluation, calibration, points = pooled_tables(self.findings, models)
        tables = evaluation._asdict() | {"calibration": calibration, "operating_points": points}
        folder.mkdir(exist_ok=True)
        mean_over, grid = tables.pop("mean_over"), next(iter(models.values()))[1]
        for name, table in tables.items():
            write_atomic(folder / f"{name}.csv", table.to_csv(index=False).encode())
        films, patients = map(int, grid["films"])
        found = {"models": about, "mean_over": mean_over, "outputs": self.findings}
        found |= {"films": films, "patients": patients, "hospitals": list(self.members)}
        found |= OF_FILMS | {"fingerprint": "", "yardsticks": None}
        write_atomic(path, json.dumps(found, indent=1).encode())
        print(f"tested on {films} films of {patients} patients: {folder}", flush=True)

    def judge(self, seed: int, state: State) -> tuple[Spans, Sums, Sums]:
        """Return what `pooled_tables` wants of a model; MaskFault where no films could give it."""
        count, about = len(self.findings), {"seed": seed, "round": 0}
        spans = spans_of(self.add_up("span", about, state, span_shapes(count)))
        about["plan"] = json.dumps(spans)
        grid = self.add_up("grid", about, state, grid_shapes(count))
        about["plan"] = json.dumps(dataclasses.asdict(plan_of(spans, grid)))
        sums = self.add_up("draws", about, state, draw_shapes(count))
        counted = sums["counts"][..., 0].sum(axis=2).T  # of every film once
        if not np.array_equal(counted, grid["test"].sum(axis=2)):
            raise MaskFault("the sums of the test are none of any films: somebody lies")
        return spans, grid, sums

    def add_up(
        self, kind: str, about: dict[str, Any], state: State,
        shapes: dict[str, tuple[int, ...]],
    ) -> Sums:  # fmt: skip
        """Return one step's sums over all hospitals."""
        zero = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        orders = dict.fromkeys(self.members, about)
        why = "not tested without {}: the same command tests once all are back"
        found = self.collect(kind, f"evaluate.{kind}", orders, state, zero, why)
        sums = {name: value.numpy() for name, value in found.items()}
        signed = "gaps", "slope"  # sums of what lies on either side
        if any((value < 0).any() for name, value in sums.items() if name not in signed):
            raise MaskFault(f"the sums of the test's {kind} are none of any films: somebody lies")
        return sums
