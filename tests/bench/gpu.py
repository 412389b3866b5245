"""What only a GPU can show, by one command: `python tests/bench/gpu.py [--device cpu --small]`.

It needs torch, torchvision, numpy, pandas, scikit-learn, safetensors, Pillow and this checkout; no
network, no notebooks, no films but the phantom's. Each part is a process of its own with its own
time limit; what it measured stands in the JSON file as soon as it is known. A part that fails or
runs out of time says so there, and the others go on. `--small --device cpu` runs all of it in a
few minutes, for the tests.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import workload
from tiny import tiny_films, tiny_settings

import fedutils
from fedutils.base.device import set_up
from fedutils.base.fixed import ONE
from fedutils.base.rng import generator
from fedutils.base.state import state_hash, to_cpu
from fedutils.client import Client, make_optimizer, masked_loss
from fedutils.dataset import ChestXrayDataset, draw_motion, normalise
from fedutils.fedavg import WeightedMean
from fedutils.model import ChestResNet
from fedutils.privacy.client import PrivateClient
from fedutils.rounds import Progress
from fedutils.run import read_history
from fedutils.training.checkpoint import save_progress
from fedutils.training.replicas import start_model

LIMITS = {  # seconds for each part
    "machine": 60, "repeats": 150, "precision": 120, "overflow": 60, "speed": 180, "steps": 60,
    "compiled": 90, "features": 60, "private": 60, "estimate": 60,
}  # fmt: skip
NIH_TRAIN, NIH_VAL = 75_000, 11_500  # films, about, of NIH's official training list
Measured = dict[str, Any]


class Bench:
    """The device, the sizes, and where films lie."""

    def __init__(self, device: str, small: bool, work: Path) -> None:
        self.device, self.small, self.work = torch.device(device), small, work
        self.cuda, self.home = self.device.type == "cuda", work / "phantom"

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, task: Callable[[], Any], times: int = 3) -> float:
        """Return the least of some timings of a task, after one to warm up."""
        took = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            task()
            self.wait()
            took.append(time.perf_counter() - began)
        return min(took[1:])

    def settings(self, name: str, **changes: Any) -> fedutils.Settings:
        """Settings of a run of the phantom's films, of the whole network in each client."""
        about = {"name": name, "device": str(self.device), "threads": 4, "precision": "auto"}
        about |= {
            "tracked": "all",
            "batchnorm": "precise",
            "rounds": 3,
            "lr": 1e-3,
            "augment": True,
        }
        about |= {"optimizer": "adamw", "weight_decay": 1e-4}
        return workload.settings(self.home, **about | changes)

    def phantom(self) -> ChestXrayDataset:
        """Return the phantom's films of 64 pixels, with split and client; if small, stripes."""
        if not self.small:
            workload.prepare(self.home, 64)
            return workload.films(self.home)
        films = tiny_films(self.home, 80, workload.CLIENTS, 32)
        about = {"fingerprint": "tiny", "image_size": 32, "declared": {"": films.findings}}
        (self.home / "prepared" / "report.json").write_text(json.dumps(about))
        return films

    def train(self, name: str, **changes: Any) -> tuple[fedutils.Training, float]:
        """Train a run of the phantom from the start; return it and the seconds of its rounds."""
        films = self.phantom()
        training = fedutils.Training(self.settings(name, **changes), films)
        began = time.perf_counter()
        training.train()
        return training, time.perf_counter() - began

    def hash_of(self, training: fedutils.Training) -> str:
        """Return the hash of the state that a run ended with."""
        return training.history().query("client == ''")["state_sha256"].iloc[-1]

    def random_films(self, size: int, count: int, clients: int = 1) -> ChestXrayDataset:
        """Return training films of random pixels, which take as long as any."""
        count = min(count, 64) if self.small else count
        return tiny_films(self.work / f"random-{size}-{count}", count, clients, size)


def machine(bench: Bench) -> Measured:
    """The card: its matrix rates and bandwidths, which bound everything below."""
    said: Measured = {"torch": torch.__version__, "python": platform.python_version()}
    said |= {"device": str(bench.device), "cores": os.cpu_count()}
    if bench.cuda:
        said |= {"name": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        said |= {"memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9}
    edge = 8192 if bench.cuda else 512
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False), ("tf32", torch.float32, True),
        ("fp16", torch.float16, False), ("bf16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(edge, edge, device=bench.device).to(dtype)
        took = bench.seconds(lambda a=a: a @ a, 5)
        said[f"matrix_{name}_tflops"] = 2 * edge**3 / took / 1e12
    block = torch.empty(1 << (30 if bench.cuda else 24), dtype=torch.uint8)
    there = block.to(bench.device)
    said["copy_gb_s"] = 2 * block.numel() / bench.seconds(there.clone) / 1e9
    if bench.cuda:
        said["upload_gb_s"] = block.numel() / bench.seconds(lambda: block.to(bench.device)) / 1e9
        pinned = block.pin_memory()
        said["upload_pinned_gb_s"] = (
            block.numel() / bench.seconds(lambda: pinned.to(bench.device)) / 1e9
        )
    return said


def repeats(bench: Bench) -> Measured:
    """The same run twice, after a kill, and with two replicas on one card: one hash each."""
    first, _ = bench.train("first")
    said: Measured = {"hash": bench.hash_of(first), "seconds_a_round": first.seconds / 3}
    again, _ = bench.train("again")
    said["twice"] = bench.hash_of(again) == said["hash"]
    device = str(bench.device)
    both, _ = bench.train("both", device=f"{device},{device}")
    said["two_replicas"] = bench.hash_of(both) == said["hash"]
    said["two_replicas_seconds_a_round"] = both.seconds / 3
    part = [sys.executable, __file__, "--part", "killed", "--device", device]
    part += ["--work", str(bench.work), *(["--small"] if bench.small else [])]
    said["killed"] = subprocess.run(part, check=False).returncode == -signal.SIGKILL
    resumed, _ = bench.train("killed")
    said["rounds_after_the_kill"] = int(3 - _rounds_before(bench))
    said["after_a_kill"] = bench.hash_of(resumed) == said["hash"]
    for policy in ("average", "local", "frozen"):
        runs = [bench.train(f"{policy}-{i}", batchnorm=policy, rounds=1)[0] for i in (1, 2)]
        said[f"twice_{policy}"] = bench.hash_of(runs[0]) == bench.hash_of(runs[1])
    return said


def _rounds_before(bench: Bench) -> int:
    """Read how many rounds the killed process had written."""
    return int((bench.work / "killed-after").read_text())


def killed(bench: Bench) -> Measured:
    """Train, and be killed after the second round."""

    def kill(row: dict[str, Any], history: Any) -> None:
        """Leave a note, and die without a word."""
        if row["round"] == 2:
            written = read_history(bench.settings("killed").run)
            (bench.work / "killed-after").write_text(str(written["round"].max()))
            os.kill(os.getpid(), signal.SIGKILL)

    films = bench.phantom()
    fedutils.Training(bench.settings("killed"), films).train(kill)
    return {}


def precision(bench: Bench) -> Measured:
    """Loss and AUROC of each precision after the same rounds, and what a round takes."""
    said: Measured = {}
    rounds, films = 1 if bench.small else 8, bench.phantom()
    for name in ("fp32", "tf32", "bf16", "fp16"):
        wanted = "fp32" if name == "tf32" else name
        settings = bench.settings(f"precision-{name}", precision=wanted, rounds=rounds)
        training = fedutils.Training(settings, films)
        if name == "tf32":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        rows = training.train().query("client == ''")
        last = rows.iloc[-1]
        said[name] = {k: float(last[k]) for k in ("train_loss", "val_loss", "val_auroc")}
        said[name]["seconds_a_round"] = float(rows["seconds"].iloc[rounds // 2 :].mean())
    return said


def overflow(bench: Bench) -> Measured:
    """A loss scaled too high at first: GradScaler skips steps; SCAFFOLD must not count them."""
    scaler, counted = torch.amp.GradScaler, []

    class Watched(fedutils.strategies.Scaffold):
        """Notes how many steps it is told of."""

        def end(self, sent: Any, kept: Any, final: Any, steps: int) -> Any:
            """Note the steps."""
            counted.append(steps)
            return super().end(sent, kept, final, steps)

    def high(*about: Any, **more: Any) -> torch.amp.GradScaler:
        """Make a scaler that overflows at once."""
        return scaler(*about, init_scale=2.0**24, **more)

    films = bench.phantom()
    about = {"precision": "fp16", "strategy": "scaffold", "optimizer": "sgd", "rounds": 2}
    about |= {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.01}
    about |= (
        {"batch_size": 4, "tracked": "fc", "local_epochs": 6}
        if bench.small
        else {"local_epochs": 6}
    )
    with mock.patch("torch.amp.GradScaler", high):
        settings = bench.settings("overflow", **about)
        training = fedutils.Training(settings, films, Watched)
        history = training.train()
    taken = sum(len(list(c._batches(1))) for c in training.jobs[0].clients) * 2
    return {
        "batches": taken,
        "steps_counted": sum(counted),
        "skipped": taken - sum(counted),
        "finite": bool(history["val_loss"].dropna().map(torch.tensor).map(torch.isfinite).all()),
        "failed": int((history["status"] != "ok").sum()),
    }


def speed(bench: Bench) -> Measured:
    """Films a second of a client's training against a bare loop on tensors that lie on the card."""
    if bench.small:
        return {"32 64 all": _one_speed(bench, bench.random_films(32, 64), 64, "all")}
    said: Measured = {}
    for size, batch in ((224, 64), (224, 256), (320, 256)):
        films = bench.random_films(size, 2048)
        for mode in ("all", "all augmented", "frozen", "cached"):
            said[f"{size} {batch} {mode}"] = _one_speed(bench, films, batch, mode)
    return said


def _one_speed(bench: Bench, films: ChestXrayDataset, batch: int, mode: str) -> Measured:
    """Measure one size, batch and mode: ours, over a client's round of 10,240 films, and bare."""
    set_up(4, "auto")
    epochs = 1 if bench.small else 5
    about = {"tracked": "all" if mode.startswith("all") else "layer4,fc", "batch_size": batch}
    about |= {"augment": mode.endswith("augmented"), "batchnorm": "average", "precision": "auto"}
    about |= {"local_epochs": epochs, "device": str(bench.device)}
    settings = tiny_settings(bench.work, **about)
    model = start_model(settings, 0, 14).place(bench.device)
    if mode == "cached":
        films = films.holding(_features(model, films))
    client = Client("client-1", films, settings, 0)
    sent = to_cpu(model.tracked_state())
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    ours = epochs * len(films) / bench.seconds(lambda: client.fit(model, sent, {}, 1), 1)
    peak = torch.cuda.max_memory_allocated() / 1e9 if bench.cuda else 0.0
    there = [part.to(bench.device) for part in films.batch(range(len(films)))]
    took = bench.seconds(lambda: _bare_epoch(model, settings, *there))
    bare = len(films) / took
    return {"films_s": ours, "peak_gb": peak, "bare_films_s": bare, "of_bare": ours / bare}


def _features(model: ChestResNet, films: ChestXrayDataset) -> Any:
    """Return what the trunk makes of the films, as the cache holds it."""
    parts = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(films), 64):
            pixels, _ = films.batch(range(start, min(start + 64, len(films))))
            output = model.features(pixels.to(model.fc.weight.device))
            parts.append(output.permute(0, 2, 3, 1).half().cpu())
    return torch.cat(parts).numpy()


def _bare_epoch(
    model: ChestResNet, settings: fedutils.Settings, films: torch.Tensor, labels: torch.Tensor
) -> None:
    """Train one epoch on what lies on the device, in order, with nothing else."""
    model.train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], settings)
    for start in range(0, len(films), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        loss = masked_loss(model(films[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def steps(bench: Bench) -> Measured:
    """Where the time of a round goes: milliseconds a batch of 64, and a round's fixed costs."""
    films, size = bench.random_films(32 if bench.small else 224, 512), 64
    settings = tiny_settings(bench.work, tracked="all", device=str(bench.device))
    model = start_model(settings, 0, 14).place(bench.device).train()
    rng = generator(0, "bench")
    pixels, labels = films.batch(range(size), bench.device)
    channels = normalise(pixels)
    optimizer = make_optimizer(list(model.parameters()), settings)
    state = to_cpu(model.tracked_state())

    def step() -> None:
        """Forward, backward, and the optimiser."""
        loss = masked_loss(model(channels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def aggregate() -> None:
        """Average five clients."""
        mean = WeightedMean()
        for _ in range(5):
            mean.add(state, ONE // 5)
        mean.result()

    tasks = {
        "read and upload": lambda: films.batch(range(size), bench.device),
        "augment and normalise": lambda: normalise(pixels, draw_motion(rng, len(pixels))),
        "normalise": lambda: normalise(pixels),
        "step": step,
        "load the state": lambda: model.load(state),
        "state to the CPU": lambda: to_cpu(model.tracked_state()),
        "aggregate five": aggregate,
        "hash": lambda: state_hash(state),
        "checkpoint": lambda: save_progress(bench.work / "trial", Progress(state), "trial"),
    }
    return {f"{name} ms": 1000 * bench.seconds(task) for name, task in tasks.items()}


def compiled(bench: Bench) -> Measured:
    """torch.compile: what a step gains, and after how many films it has paid for itself."""
    if bench.small:
        return {"skipped": "compiling takes longer than the tests allow"}
    films = bench.random_films(224, 512)
    settings = tiny_settings(bench.work, tracked="all", batch_size=64, device=str(bench.device))
    model = start_model(settings, 0, 14).place(bench.device).train()
    pixels, labels = films.batch(range(min(64, len(films))), bench.device)
    channels, said = normalise(pixels), {}

    def step(forward: Callable[..., torch.Tensor]) -> None:
        """Forward and backward."""
        model.zero_grad()
        masked_loss(forward(channels), labels).backward()

    plain = bench.seconds(lambda: step(model), 10)
    for mode in ("default", "reduce-overhead"):
        fast, began = torch.compile(model, mode=mode), time.perf_counter()
        step(fast)
        bench.wait()
        said[mode] = _gain(bench, plain, lambda f=fast: step(f), time.perf_counter() - began)
    torch.compiler.reset()
    began, graph = time.perf_counter(), torch.cuda.CUDAGraph()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(model)
    bench.wait()
    model.zero_grad()
    with torch.cuda.graph(graph):
        masked_loss(model(channels), labels).backward()
    said["graph alone"] = _gain(bench, plain, graph.replay, time.perf_counter() - began)
    return said | {"plain_ms": 1000 * plain}


def _gain(bench: Bench, plain: float, task: Callable[[], Any], first: float) -> Measured:
    """Return what a faster step of 64 films gains, and the films after which it has paid."""
    took = bench.seconds(task, 10)
    pays = first / (plain - took) * 64 if took < plain else None
    return {"first_s": first, "gain": plain / took, "films_until_it_pays": pays}


def features(bench: Bench) -> Measured:
    """The cache of a frozen trunk: written, opened, and trained from."""
    about = {"tracked": "layer4,fc", "augment": False, "cache_features": True, "rounds": 2}
    films = bench.phantom()
    training = fedutils.Training(bench.settings("cached", **about), films)
    began = time.perf_counter()
    training.features.fill()
    wrote = time.perf_counter() - began
    history = training.train().query("client == ''")
    count = len(training.films.store)
    plain, _ = bench.train("uncached", **about | {"cache_features": False})
    last = plain.history().query("client == ''")
    return {
        "films": count,
        "films_s_written": count / wrote,
        "round_s": float(history["seconds"].iloc[-1]),
        "round_s_without": float(last["seconds"].iloc[-1]),
        "auroc": float(history["val_auroc"].iloc[-1]),
        "auroc_without": float(last["val_auroc"].iloc[-1]),
    }


def private(bench: Bench) -> Measured:
    """Gradients by patient: patients a second and memory, of `fc` and of `layer4,fc`."""
    said: Measured = {}
    count, size = (64, 32) if bench.small else (1024, 224)
    films = tiny_films(bench.work / "private", count, 1, size)
    for tracked in ("fc", "layer4,fc"):
        about = {"dp": "patient", "noise_multiplier": 1.0, "batchnorm": "frozen", "delta": 1e-5}
        about |= {"tracked": tracked, "batch_size": 256, "device": str(bench.device)}
        settings = tiny_settings(bench.work / "private", **about)
        model = start_model(settings, 0, 14).place(bench.device)
        client = PrivateClient("client-1", films, settings, 0)
        sent = to_cpu(model.tracked_state())
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        took = bench.seconds(lambda c=client, m=model, s=sent: c.fit(m, s, {}, 1), 2)
        peak = torch.cuda.max_memory_allocated() / 1e9 if bench.cuda else 0.0
        said[tracked] = {"patients_s": len(films) / took, "peak_gb": peak}
    return said


def estimate(bench: Bench) -> Measured:
    """Notebook 03's estimate against what the rounds then took."""
    films = bench.phantom()
    training = fedutils.Training(
        bench.settings("estimate", rounds=4, local_epochs=1 if bench.small else 8), films
    )
    said = training.estimate_seconds()
    training.train()
    return {"estimated_s": said, "took_s": training.seconds, "ratio": said / training.seconds}


def session(parts: dict[str, Measured]) -> Measured:
    """A full session on NIH's films from the rates above: here, and on a T4 by its datasheet.

    Assumed for the T4: a step's time grows with the ratio of the measured bf16 matrix rate to
    40 TFLOP/s, what a T4 gives of its 65 in fp16 products.
    """
    said: Measured = {}
    for name, row in parts.get("speed", {}).items():
        if not isinstance(row, dict) or " 64 " not in f" {name} ":
            continue
        hours = (NIH_TRAIN + NIH_VAL / 3) / row["films_s"] / 3600
        slower = parts["machine"]["matrix_bf16_tflops"] / 40
        said[name] = {"minutes_a_round": 60 * hours, "minutes_a_round_T4": 60 * hours * slower}
    return said


PARTS: dict[str, Callable[[Bench], Measured]] = {
    "machine": machine, "repeats": repeats, "precision": precision, "overflow": overflow,
    "speed": speed, "steps": steps, "compiled": compiled, "features": features,
    "private": private, "estimate": estimate,
}  # fmt: skip


def run_part(name: str, options: argparse.Namespace, work: str) -> Measured:
    """Run a part as a process; return what it measured, or why there is nothing."""
    part = [sys.executable, __file__, "--part", name, "--device", options.device, "--work", work]
    part += ["--small"] if options.small else []
    began = time.perf_counter()
    try:
        done = subprocess.run(
            part, timeout=LIMITS[name] * (5 if options.small else 1), capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMITS[name]} s"}
    took = {"part_seconds": time.perf_counter() - began}
    if done.returncode:
        return took | {"failed": done.stderr[-1500:]}
    return took | json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run all parts, or the one that is named, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for the tests")
    parser.add_argument("--out", default="work/gpu.json")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        bench = Bench(options.device, options.small, Path(options.work))
        task = PARTS.get(options.part, killed)
        # Or an equal run beside would be taken for this one's, and every repeat be trivially equal.
        with mock.patch("fedutils.training.checkpoint.adopt_progress", lambda *about: None):
            print(json.dumps(task(bench)))
        return
    out, said = Path(options.out), {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name in options.only.split(","):
            said[name] = run_part(name, options, work)
            if name == "speed" and "machine" in said:
                said["session"] = session(said)
            out.write_text(json.dumps(said, indent=1))
            print(name, json.dumps(said[name], indent=1), flush=True)
    sys.exit(any("failed" in part for part in said.values()))


if __name__ == "__main__":
    main()
