"""Train the phantom's scanners in the simulation and over Flower, plain and masked; compare."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
from safetensors import safe_open

from fedutils.base.errors import NotebookFailed
from fedutils.base.files import write_atomic
from fedutils.batch.run import run
from fedutils.films.read import DataSet
from fedutils.films.sources import open_data
from fedutils.network.commands import (
    check_flower,
    flower_environment,
    free_port,
    run_server_app,
    superlink,
    supernode,
)

DEMO = {"profile": "demo", "partition": "scanner", "num_clients": 5, "threads": 1, "min_clients": 2}
HERE = ("partition",)  # means nothing over the network
RUNS = {"flower": {}, "masked": {"secure_aggregation": True}}
DEMO_SECONDS = 3600  # more than a slow machine needs
READS = ("profile", "seed", "image_size")  # what notebook 02 goes by
STOP_SECONDS = 15  # between asking a process to stop and killing it


class Flower:
    """A Flower network on this machine, in a folder of its own; at the end all processes stop.

    The folder holds a log of each process, and Flower's own home.
    """

    def __init__(self, folder: Path, keys: Path | None = None) -> None:
        check_flower()
        self.folder, self.keys, self.port = folder.resolve(), keys, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen] = {}
        (self.folder / "home").mkdir(parents=True, exist_ok=True)
        self.environment = flower_environment(self.folder / "home", self.address, keys)

    def __enter__(self) -> "Flower":
        """Start the SuperLink."""
        self.start("superlink", superlink("127.0.0.1", self.port, self.folder, self.keys))
        try:
            self.wait_for_superlink(60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: type | BaseException | TracebackType | None) -> None:
        """Stop all processes, the SuperLink last."""
        for name in reversed(list(self.processes)):
            self.stop(name)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process whose output goes to NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, cwd=self.folder
            )

    def stop(self, name: str) -> None:
        """Stop a process by its pid, and kill it if it does not stop."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait_for_superlink(self, seconds: float) -> None:
        """Wait until the SuperLink listens; raise NotebookFailed if it does not."""
        end = time.monotonic() + seconds
        while self.processes["superlink"].poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        raise NotebookFailed(f"the SuperLink did not start, see {self.folder / 'superlink.log'}")

    def join(self, name: str, work: Path) -> None:
        """Start the SuperNode of a hospital."""
        self.start(name, supernode(name, work, self.address, free_port(), self.keys, {}))


def demo(values: Mapping[str, Any]) -> None:
    """Train the phantom's scanners in the simulation and over Flower, and compare the models.

    Each hospital gets a folder with its own films and prepares them with notebook 02; notebook 04
    evaluates the run like any other. Raises NotebookFailed unless the models are identical.
    """
    check_flower()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same processor for both
    common = {**DEMO, **values}
    simulated = run(common | {"name": "simulation", "device": "cpu,cpu"}, "02,03")
    clients = pd.read_csv(simulated.run / "clients.csv", dtype=str)
    data = open_data(simulated.data_dir, simulated.work_dir)
    homes = scatter(data, clients, simulated.run.parents[1] / "hospitals")
    for name, home in homes.items():
        print(f"\n{name}")
        here = {"data_dir": str(home / "films"), "work_dir": str(home), "name": "flower"}
        run({k: common[k] for k in READS if k in common} | here, "02")
    over = {name: value for name, value in common.items() if name not in HERE}
    about = {}
    with Flower(simulated.run.parent / "flower-processes") as flower:
        for name, home in homes.items():
            flower.join(name, home)
        for name, masks in RUNS.items():
            place = {"work_dir": simulated.work_dir, "name": name}
            about[name] = run_server_app(over | masks | place, flower.environment, DEMO_SECONDS)
    for name, masks in RUNS.items():
        clients.to_csv(simulated.run.with_name(name) / "clients.csv", index=False)
        run(common | masks | {"name": name}, "04")
    compare_models(simulated.run, about)


def scatter(data: DataSet, clients: pd.DataFrame, folder: Path) -> dict[str, Path]:
    """Write each client's patients as a folder `films/` of its own in NIH's layout, films linked.

    Returns the folders by the client's name. They stand for the hospitals' machines.
    """
    placed = data.table.merge(clients[["patient_id", "client"]], on="patient_id")
    homes = {}
    for name, films in placed.groupby("client"):
        homes[name] = folder / name
        images = homes[name] / "films" / "images"
        images.mkdir(parents=True, exist_ok=True)
        names = set(films["image_index"])
        for path in sorted(data.folder.glob("*.*")):
            lines = path.read_text().splitlines(keepends=True)
            own = [line for line in lines if line.strip().partition(",")[0] in names]
            head = {".csv": lines[:1], ".json": lines}.get(path.suffix, [])
            write_atomic(images.parent / path.name, "".join(head + own).encode())
        for film in films.itertuples():
            link = images / film.image_index
            link.unlink(missing_ok=True)
            link.symlink_to((data.folder / film.path).resolve())
    return homes


def compare_models(simulated: Path, about: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the hash of each run's model after the last round, and what went over the wire.

    `about` says by name what Flower told of a run. Raises NotebookFailed unless all rounds have the
    same model, validation and kept round.
    """
    told = {}
    for folder in (simulated, *(simulated.with_name(name) for name in about)):
        history = pd.read_csv(folder / "history.csv", keep_default_na=False)
        models = history[(history["arm"] == "federated") & (history["client"] == "")]
        kept = load_about(folder / "models" / "federated-s0.safetensors")
        told[folder.name] = (
            models[["state_sha256", "val_auroc", "val_loss"]].to_numpy().tolist(),
            kept,
        )
        seconds = models["seconds"].astype(float).median()
        print(f"{folder.name:<11} {models['state_sha256'].iloc[-1]}  {seconds:.1f} s a round")
    rounds = len(models)
    for name, run_about in about.items():
        sent = run_about["network-traffic"]["total-bytes"] / 1e6
        print(f"{name}: {sent:.0f} MB over the wire, {sent / rounds:.0f} MB a round")
    if any(one != told[simulated.name] for one in told.values()):
        raise NotebookFailed("the rounds of simulation and network differ")
    print("identical")


def load_about(path: Path) -> dict[str, str]:
    """Return what a model's file says about it: which round was kept."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


if __name__ == "__main__":
    demo(dict(pair.split("=", 1) for pair in sys.argv[1:]))
