"""Apple's pfl-research on the same task: FederatedAveraging in one process, weighted by films.

As its own benchmarks use it: films in memory, one model whose state is copied in place. Local
evaluation, which it can do before and after each client's training, is off after the first round.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import workload
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from fedutils.model import ChestResNet


def make_model() -> PyTorchModel:
    """Wrap the network as pfl wants it: with a loss, metrics, and both optimisers."""
    network = workload.build()

    def loss(films: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a training batch."""
        network.train()
        return workload.loss(network, films, labels)

    @torch.no_grad()
    def metrics(films: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Return the mean loss of an evaluation batch."""
        network.eval()
        value = workload.loss(network, films, labels).item()
        return {"loss": Weighted(value * len(films), len(films))}

    network.loss, network.metrics = loss, metrics
    local = functools.partial(torch.optim.SGD, momentum=workload.MOMENTUM)
    trained = [p for p in network.parameters() if p.requires_grad]
    return PyTorchModel(network, local, torch.optim.SGD(trained, lr=1.0))


class Validation(TrainingProcessCallback):
    """Validates the aggregated model after each round, and notes the time."""

    def __init__(self, work: Path) -> None:
        self.validate, self.auroc, self.laps = workload.validate(work), 0.0, workload.Laps()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Validate; never stop."""
        network: ChestResNet = model.pytorch_model
        self.auroc = self.validate(network)
        self.laps.lap()
        return False, Metrics()


def main(work: str, rounds: int) -> None:
    """Train from the prepared films to the last round."""
    clients, model = workload.training_films(Path(work)), make_model()
    sampler = get_user_sampler("minimize_reuse", list(clients))
    data = FederatedDataset.from_slices(clients, sampler)
    backend = SimulatedBackend(data, data, [WeightByDatapoints()])
    how: dict[str, Any] = {"evaluation_frequency": rounds + 1, "val_cohort_size": 0}
    validation = Validation(Path(work))
    FederatedAveraging().run(
        NNAlgorithmParams(central_num_iterations=rounds, train_cohort_size=len(clients), **how),
        backend,
        model,
        NNTrainHyperParams(
            local_batch_size=workload.BATCH,
            local_num_epochs=workload.EPOCHS,
            local_learning_rate=workload.RATE,
        ),
        NNEvalHyperParams(local_batch_size=workload.BATCH),
        [validation],
    )
    workload.report(rounds=validation.laps.seconds, auroc=validation.auroc)


if __name__ == "__main__":
    main(**workload.arguments())
