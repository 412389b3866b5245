"""Flower on the same task: its Simulation Runtime on Ray, FedAvg with Message and ArrayRecord.

In Flower's favour: only the tracked layers travel, each worker keeps its model and films in memory,
and `run_simulation` is used, which is deprecated but spares it the servers that `flwr run` starts.
Two workers of one thread, so that clients run side by side.
"""

import functools
import itertools
import os
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

import torch
import workload
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedutils.model import ChestResNet

client_app = ClientApp()


@functools.cache
def worker(work: str) -> tuple[ChestResNet, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the model and all clients' films, built once in each worker process."""
    model, clients = workload.build(), workload.training_films(Path(work))
    torch.set_num_threads(1)
    return model, list(clients.values())


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the local epochs on this client's films from the state that the server sent."""
    model, clients = worker(os.environ["BENCH_WORK"])
    films, labels = clients[int(context.node_config["partition-id"])]
    model.load(message.content["arrays"].to_torch_state_dict())
    optimizer, total = workload.optimizer(model), 0.0
    model.train()
    batches = (torch.randperm(len(films)).split(workload.BATCH) for _ in range(workload.EPOCHS))
    for batch in itertools.chain.from_iterable(batches):
        loss = workload.loss(model, films[batch], labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    metrics = MetricRecord(
        {"loss": total / len(films) / workload.EPOCHS, "num-examples": len(films)}
    )
    state = ArrayRecord(model.tracked_state())
    return Message(RecordDict({"arrays": state, "metrics": metrics}), reply_to=message)


def serve(work: str, rounds: int) -> ServerApp:
    """Return the server: FedAvg, and after each round the aggregated model's validation."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        """Run all rounds."""
        model, validate = workload.build(), workload.validate(Path(work))
        laps, auroc = workload.Laps(), 0.0

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            """Validate the state after a round, and note the time."""
            nonlocal auroc
            if server_round == 0:
                return None
            model.load(arrays.to_torch_state_dict())
            auroc = validate(model)
            laps.lap()
            return MetricRecord({"auroc": auroc})

        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=workload.CLIENTS)
        first = ArrayRecord(model.tracked_state())
        strategy.start(grid, first, num_rounds=rounds, evaluate_fn=evaluate)
        workload.report(rounds=laps.seconds, auroc=auroc)

    return app


def main(work: str, rounds: int) -> None:
    """Train from the prepared films to the last round."""
    import peer_flower  # by its name, so that the workers import it instead of unpickling __main__

    os.environ["BENCH_WORK"] = work  # Ray's workers inherit it
    backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    backend["init_args"] = {"num_cpus": workload.THREADS, "logging_level": "error"}
    app = serve(work, rounds)
    run_simulation(app, peer_flower.client_app, workload.CLIENTS, backend_config=backend)


if __name__ == "__main__":
    main(**workload.arguments())
