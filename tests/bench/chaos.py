"""Faults in a real network on this machine: `make flower-chaos`, or `chaos.py seed=1 rounds=10`.

SuperLink, three SuperNodes with tiny films, SCAFFOLD, and two faults in each round, drawn from the
seed: processes are killed (SIGKILL, with all that they started), each hospital's line goes through
a proxy that slows it down, cuts its connections or stops for a while, disks are full and clocks an
hour off. What ends is started again, as a user would. TCP delivers nothing twice: messages that come
twice are in `tests/network/test_faults.py`. A full disk is made by `fsync`, which gives the system's
error once; a clock by what Flower and `time` say it is: both in a `sitecustomize` of that machine.

At the end the hashes of all rounds stand beside the simulation's; status 1 unless they are identical.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from flower import Flower, load_about

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_films, tiny_homes, tiny_settings

from fedutils.base.errors import NotebookFailed
from fedutils.base.rng import generator
from fedutils.network.commands import (
    free_port,
    run_server_app,
    superlink,
    supernode,
)
from fedutils.training.training import Training

SETTINGS = {
    "strategy": "scaffold", "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05,
    "tracked": "fc", "batchnorm": "average", "min_clients": 3,
}  # fmt: skip
KINDS = (
    "server app killed", "SuperLink killed", "server's disk full", "SuperNode killed",
    "ClientApp killed", "line cut", "line stopped", "line slow", "hospital's disk full",
    "clock an hour off",
)  # fmt: skip
PER_ROUND = 2
PATIENCE = 600.0  # seconds for a fault to find its moment
BACK = 5.0  # seconds until a machine is on again
HOUR = 3600
# What each process of a machine reads at its start: CHAOS_FULL is a file whose presence makes one
# write fail, CHAOS_CLOCK one with the seconds by which its clock is off.
SITE = """
import datetime, errno, os, sys, time
def fsync(fd, real=os.fsync):
    try:
        os.unlink(os.environ["CHAOS_FULL"])
    except (KeyError, FileNotFoundError):
        return real(fd)
    raise OSError(errno.ENOSPC, "No space left on device")
os.fsync = fsync
def off():
    try:
        with open(os.environ["CHAOS_CLOCK"]) as file:
            return float(file.read())
    except (KeyError, FileNotFoundError):
        return 0.0
def shifted(wall=time.time):
    return wall() + off()
time.time = shifted
from flwr.supercore import date
def now(real=date.now):
    return real() + datetime.timedelta(seconds=off())
for module in [one for one in sys.modules.values() if vars(one).get("now") is date.now]:
    module.now = now
"""


class Line:
    """A proxy on loopback between a hospital and the server, which can be slowed, stopped or cut."""

    def __init__(self, port: int) -> None:
        self.server, self.delay = port, 0.0
        self.open = threading.Event()
        self.open.set()
        self.ends: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Connect whoever calls with the server."""
        while True:
            try:
                here, _ = self.listener.accept()
            except OSError:
                return  # it is closed
            try:
                there = socket.create_connection(("127.0.0.1", self.server), 5)
            except OSError:
                here.close()  # the server is away
                continue
            there.settimeout(None)
            self.ends += [here, there]
            for ends in ((here, there), (there, here)):
                threading.Thread(target=self.pump, args=ends, daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Carry bytes one way, until either end is closed."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.open.wait()
                time.sleep(self.delay)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Cut all connections; new ones are accepted."""
        ends, self.ends = self.ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def children(process: int) -> list[int]:
    """Return the ids of all that a process has started, and that they have."""
    text = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = dict(map(int, line.split()) for line in text.splitlines())
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def kill(*processes: int) -> None:
    """Kill processes of ours."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class Chaos(Flower):
    """A network whose machines fail: the server, and a hospital behind each line."""

    def __init__(self, folder: Path, homes: Mapping[str, Path]) -> None:
        super().__init__(folder)
        self.homes, self.began, self.said = homes, time.monotonic(), []
        self.lines = {name: Line(self.port) for name in homes}
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE)
        paths = [str(site), os.environ.get("PYTHONPATH", "")]
        self.environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.plain = dict(self.environment)

    def flag(self, name: str, what: str) -> Path:
        """Name the file that makes a machine's disk full, or its clock wrong."""
        return self.folder / f"{name or 'superlink'}.{what}"

    def start(self, name: str, command: list[str]) -> None:
        """Start a process with the clock and the disk of its machine."""
        about = {"CHAOS_FULL": self.flag(name, "full"), "CHAOS_CLOCK": self.flag(name, "clock")}
        self.environment = self.plain | {key: str(path) for key, path in about.items()}
        super().start(name, command)
        self.environment = self.plain

    def join(self, name: str, work: Path) -> None:
        """Start the SuperNode of a hospital, which calls its line."""
        address = f"127.0.0.1:{self.lines[name].port}"
        self.start(name, supernode(name, work, address, free_port(), None, {}))

    def fell(self, name: str) -> None:
        """Kill a machine's process with all that it has started."""
        process = self.processes.pop(name)
        kill(process.pid, *children(process.pid))
        process.wait()

    def stop(self, name: str) -> None:
        """Stop a process, and what outlives it."""
        others = children(self.processes[name].pid)
        super().stop(name)
        kill(*[one for one in others if Path(f"/proc/{one}").exists()])

    def apps(self, name: str, what: str) -> list[int]:
        """Return the processes of a machine that run an app of this kind."""
        found = []
        for process in children(self.processes[name].pid):
            with contextlib.suppress(OSError):
                call = Path(f"/proc/{process}/cmdline").read_bytes()
                found += [process] if what.encode() in call else []
        return found

    def wait_until(self, true: Callable[[], object]) -> bool:
        """Wait for a moment; tell whether it came."""
        end = time.monotonic() + PATIENCE
        while not (here := true()) and time.monotonic() < end:
            time.sleep(0.1)
        return bool(here)

    def say(self, what: str) -> None:
        """Print what happened, and when."""
        print(f"{time.monotonic() - self.began:7.1f} s  {what}", flush=True)

    def happen(self, kind: str, name: str, rng: np.random.Generator) -> bool:
        """Let a fault happen; tell whether it did."""
        if kind == "SuperLink killed":
            self.fell("superlink")
            time.sleep(BACK)
            self.start("superlink", superlink("127.0.0.1", self.port, self.folder, None))
            self.wait_for_superlink(60)
        elif kind == "SuperNode killed":
            self.fell(name)
            time.sleep(BACK)
            self.join(name, self.homes[name])
        elif kind == "clock an hour off":
            clock = self.flag(name, "clock")
            clock.write_text(str(rng.choice((-HOUR, HOUR))))
            time.sleep(rng.uniform(30, 100))
            clock.unlink()
        elif kind in ("server app killed", "ClientApp killed"):
            place, what = ("superlink", "serverapp") if name == "" else (name, "clientapp")
            ending = self.apps(place, what) if name else []  # of messages that are answered
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                self.wait_until(lambda: set(self.apps(place, what)) - {*ending})
                time.sleep(rng.uniform(0, 6))
                if there := set(self.apps(place, what)) - {*ending}:
                    kill(*there)
                    return True
            return False
        elif kind.endswith("disk full"):
            flag = self.flag(name, "full")
            flag.touch()
            return self.wait_until(lambda: not flag.exists())
        else:
            self.disturb(self.lines[name], kind, rng)
        return True

    def disturb(self, line: Line, kind: str, rng: np.random.Generator) -> None:
        """Let a line be bad for a while."""
        if kind == "line cut":
            line.cut()
        elif kind == "line stopped":
            line.open.clear()
            time.sleep(rng.uniform(5, 30))
            line.open.set()
        else:
            line.delay = 0.3
            time.sleep(rng.uniform(5, 30))
            line.delay = 0.0


def draw(
    seed: int, rounds: int, names: list[str]
) -> Iterator[tuple[int, str, str, np.random.Generator]]:
    """Yield faults by round: of each kind as many, at hospitals that the seed draws."""
    order, rng = generator(seed, "chaos"), generator(seed, "moments")
    kinds: list[str] = []
    while len(kinds) < rounds * PER_ROUND:
        kinds += order.permutation(KINDS).tolist()
    for number, kind in enumerate(kinds[: rounds * PER_ROUND]):
        at_server = kind.startswith(("server", "SuperLink"))
        yield number // PER_ROUND + 1, kind, "" if at_server else str(order.choice(names)), rng


def rounds_done(run: Path) -> int:
    """Count the rounds in a history."""
    path = run / "history.csv"
    if not path.is_file() or not path.stat().st_size:
        return 0
    table = pd.read_csv(path, keep_default_na=False)
    return int(table[table["client"] == ""]["round"].max()) if (table["client"] == "").any() else 0


def keep_training(
    chaos: Chaos, values: Mapping[str, object], run: Path, over: threading.Event
) -> None:
    """Start the run again, until it is finished."""
    while not (run / "finished.json").is_file() and not over.is_set():
        try:
            run_server_app(values, chaos.plain, 900, 300)
        except (NotebookFailed, ValueError) as error:
            chaos.say(f"the server ended, and is started again: {str(error).splitlines()[0][:150]}")
        time.sleep(2)


def compare(alone: Path, run: Path, places: list[Path]) -> bool:
    """Print the hashes of all rounds of both runs; tell whether all is as in the undisturbed one."""
    tables = [pd.read_csv(one / "history.csv", keep_default_na=False) for one in (alone, run)]
    ends = [table[table["client"] == ""].set_index("round")["state_sha256"] for table in tables]
    print(pd.concat(ends, axis=1, keys=["simulation", "network"]).to_string(), flush=True)
    good = tables[1][tables[1]["status"] == "ok"]
    once = not good.duplicated(["round", "client"]).any() and set(good["round"].value_counts()) == {
        4
    }
    kept = [load_about(one / "models/federated-s0.safetensors") for one in (alone, run)]
    left = [path for place in places for path in place.rglob(".*.tmp")]
    print(f"each round once: {once}; kept rounds: {kept}; temporary files: {left}", flush=True)
    return ends[0].tolist() == ends[1].tolist() and once and kept[0] == kept[1] and not left


def main(seed: int = 0, rounds: int = 10, keep: str = "") -> int:
    """Train through the faults, and compare; return the exit status."""
    work = Path(keep or tempfile.mkdtemp(prefix="chaos-"))
    films = tiny_films(work / "alone", films=30)
    settings = tiny_settings(work / "alone", rounds=rounds, **SETTINGS)
    Training(settings, films).train()
    homes = tiny_homes(work / "homes", films)
    values = asdict(settings) | {"work_dir": str(work / "server"), "name": "run"}
    run, happened, over = work / "server/runs/run", 0, threading.Event()
    with Chaos(work / "flower", homes) as chaos:
        for name, home in homes.items():
            chaos.join(name, home)
        about = chaos, values, run, over
        trains = threading.Thread(target=keep_training, args=about, daemon=True)
        trains.start()
        try:
            for round, kind, name, rng in draw(seed, rounds, list(homes)):
                chaos.wait_until(lambda: rounds_done(run) >= round - 1)  # noqa: B023
                time.sleep(rng.uniform(0, 5))
                chaos.say(f"round {rounds_done(run) + 1}: {kind} {name}")
                if chaos.happen(kind, name, rng):
                    happened += 1
                else:
                    chaos.say(f"{kind} {name}: found no moment")
            trains.join(3 * PATIENCE)
        finally:
            over.set()
    chaos.say(f"{happened} of {rounds * PER_ROUND} faults happened; seed {seed}; {work}")
    same = compare(settings.run, run, [work / "server", work / "homes"])
    print("identical" if same else "NOT identical", flush=True)
    return int(not same or happened < rounds * PER_ROUND)


if __name__ == "__main__":
    given = dict(pair.split("=", 1) for pair in sys.argv[1:])
    numbers = {key: int(value) for key, value in given.items() if key in ("seed", "rounds")}
    sys.exit(main(**numbers, keep=given.get("keep", "")))
