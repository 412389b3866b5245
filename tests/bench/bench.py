"""Every promised ratio, measured here and now, in one table: `python tests/bench/bench.py [--fast]`.

Each arm runs in a process of its own, so that start-up and memory are honest, and arms take turns,
the first one alternating, so that a slow minute of the machine meets all of them; what is held
against its own limit takes turns in one process. All but the demo train layer4 and fc with plain SGD
and frozen BatchNorm, since that is what all peers can do. A row is the
median of paired ratios with its order-statistic interval (95 % from six pairs on; with fewer the
range). Beside it stands its limit: what it would be if nothing but the arithmetic took time, which is
measured in the same turn, by the same kernels in a loop that does nothing else, and by Pillow alone.
What a shared machine makes noisy is repeated: where a median misses its target, as many pairs again
are measured, once (not in the fast half), and the median over ALL of them decides; no pair is ever
left out. A row without a target is only reported. What cannot run here (a peer that is not
installed, no bf16, no real films) is skipped with the reason and counts as neither met nor missed.

Writes `work/bench.json`; exit status 1 when a target is missed.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from scipy.stats import binom

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 3600  # seconds an arm may take
TIMES_LONGER = 2  # as many pairs at most, where a target is missed
LIMIT_OF = "limit of "
COMPARE = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}
Rows = dict[str, list[float]]  # the values of some rows, one a pair


class Skip(Exception):
    """This cannot be measured here, for the reason given."""


class ArmFailed(Exception):
    """A process that was to be measured failed; its output was printed."""


@dataclass(frozen=True)
class Result:
    """One row of the table; `met` is None where there is no target or nothing was measured."""

    name: str
    measured: float | None
    target: str | None
    met: bool | None
    interval: tuple[float, float] | None = None
    pairs: int = 0
    note: str = ""
    limit: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Bench:
    """A benchmark: `once(work, fast, turn)` measures one pair (or several) of all its rows.

    `targets` holds a row's name and its target such as "<= 1.03" or ">= 0.9 of the limit", or None.
    The limit of a row is a row of its own, named LIMIT_OF and then as that. `calls` is how often `once`
    is called, in full and in the fast half; 0 leaves the benchmark out.
    """

    once: Callable[[Path, bool, int], Rows]
    targets: dict[str, str | None]
    calls: int
    fast_calls: int


def median_interval(values: list[float]) -> tuple[float, float]:
    """Return the order statistics that enclose the median with 95 % confidence, or the range."""
    ordered, count = sorted(values), len(values)
    rank = max(1, int(binom.ppf(0.025, count, 0.5)))
    return ordered[rank - 1], ordered[count - rank]


def meets(value: float, target: str, share: float | None = None) -> bool:
    """Tell whether a value, which is a share of its limit, keeps a target (see `Bench`)."""
    sign, bound, *of_limit = target.split()
    if of_limit and share is None:
        raise ValueError(f"{target!r}, and no limit was measured")
    return COMPARE[sign](share if of_limit else value, float(bound))


def judge(name: str, seen: Rows, target: str | None) -> Result:
    """Make a row from its paired values, and those of its limit, which may be one for all pairs.

    How near it comes is the median of the paired shares; above 1 the limit was none.
    """
    values, limits = seen[name], seen.get(LIMIT_OF + name, [])
    middle, limit, near = statistics.median(values), None, None
    if limits:
        limit = statistics.median(limits)
        every = limits if len(limits) == len(values) else [limit] * len(values)
        near = statistics.median(v / most for v, most in zip(values, every, strict=True))
        near = 1 / near if (target or "").startswith("<") else near
    met = meets(middle, target, near) if target else None
    interval = median_interval(values)
    return Result(name, middle, target, met, interval, len(values), limit=limit, share=near)


def measure(bench: Bench, work: Path, fast: bool) -> list[Result]:
    """Run one benchmark, longer where a target is missed; return its rows, or one a skipped row."""
    calls, seen = bench.fast_calls if fast else bench.calls, {}
    for turn in range(calls * (1 if fast else TIMES_LONGER)):
        try:
            rows = bench.once(work, fast, turn)
        except Skip as why:
            return [
                Result(n, None, t, None, note=f"skipped: {why}") for n, t in bench.targets.items()
            ]
        except Exception as why:  # of a table of hours one benchmark is lost, and counts as missed
            print(f"{type(why).__name__}: {why}", flush=True)
            return [Result(n, None, t, False, note=str(why)) for n, t in bench.targets.items()]
        for name, values in rows.items():
            seen.setdefault(name, []).extend(values)
        rows = [name for name in seen if not name.startswith(LIMIT_OF)]
        results = [judge(name, seen, bench.targets.get(name)) for name in rows]
        absent = [] if fast else [name for name in bench.targets if name not in seen]
        results += [Result(n, None, bench.targets[n], False, note="not there") for n in absent]
        if (turn + 1) % calls == 0 and all(result.met is not False for result in results):
            break
    return results


def run(script: str, **arguments: Any) -> dict[str, Any]:
    """Run an arm in a process of its own; add its wall time and the peak memory of all it started.

    Raises ArmFailed, after printing what it said, where it fails or takes longer than LIMIT.
    """
    command = [sys.executable, str(HERE / script), json.dumps(arguments)]
    began, peak = time.perf_counter(), [0.0]
    with tempfile.TemporaryFile("w+") as output:
        arm = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        threading.Thread(target=follow_memory, args=(arm, peak), daemon=True).start()
        status = wait_for(arm)
        took = time.perf_counter() - began
        output.seek(0)
        lines = output.read().splitlines()
    measured = [text for text in lines if text.startswith('{"')]
    if status or not measured:
        print(*lines[-30:], sep="\n", flush=True)
        raise ArmFailed(f"{script} failed with status {status}")
    return json.loads(measured[-1]) | {"total": took, "megabytes": peak[0]}


def wait_for(arm: psutil.Popen) -> int:
    """Wait for an arm; end it, and all that it started, where it takes too long."""
    try:
        return arm.wait(LIMIT)
    except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
        for part in [*arm.children(recursive=True), arm]:
            part.kill()
        return arm.wait()


def follow_memory(arm: psutil.Popen, peak: list[float]) -> None:
    """Note the peak of the memory, in MB, of a process and its children, shared pages once."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it ends while it is looked at
        while arm.is_running():
            parts = [arm, *arm.children(recursive=True)]
            peak[0] = max(peak[0], sum(memory(part) for part in parts))
            time.sleep(1)


def memory(process: psutil.Process) -> float:
    """Return the proportional memory of a process in MB, 0 where it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_full_info().pss / 2**20
    return 0.0


def in_turn(arms: dict[str, Callable[[], Any]], turn: int) -> dict[str, Any]:
    """Run arms one after the other, every other turn in the opposite order."""
    names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
    return {name: arms[name]() for name in names}


def films_folder(work: Path) -> tuple[str, str]:
    """Return a folder with 1024-pixel films and what they are: real ones where they are at hand."""
    given = os.environ.get("NIH_TEST_DATA", "")
    if given and (Path(given) / "nih_sample").is_dir():
        return str(Path(given).resolve() / "nih_sample"), "real films"
    from fedutils import write_phantom

    return str(write_phantom(work / "phantom-1024", 40, 1024)), "phantom films"


def has_bf16() -> bool:
    """Tell whether the CPU multiplies bfloat16 itself."""
    about = Path("/proc/cpuinfo")
    return about.is_file() and "bf16" in about.read_text()


def prepared(work: Path, size: int = 64) -> str:
    """Return the folder with the films of the comparison, written and decoded once."""
    folder = work / f"comparison-{size}"
    if not (folder / "prepared" / "index.csv").is_file():
        code = f"import workload; workload.prepare(workload.Path({str(folder)!r}), {size})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
    return str(folder)


# ---------------------------------------------------------------------------- the benchmarks


def decoding(work: Path, fast: bool, turn: int) -> Rows:
    """Decode once: films/s of notebook 02 against Pillow alone in a process a core."""
    folder, _ = films_folder(work)
    seen = run("decoding.py", work=str(work), data=folder, films=80 if fast else 320, pairs=3)
    ratios = [ours / floor for ours, floor in zip(seen["ours"], seen["floor"], strict=True)]
    return {
        DECODE: ratios,
        LIMIT_OF + DECODE: [1.0],
        f"{DECODE}: films/s": seen["ours"],
        LIMIT_OF + f"{DECODE}: films/s": seen["floor"],
    }


def reading(work: Path, fast: bool, turn: int) -> Rows:
    """A client's epochs against their kernels alone; reading its batches, in shares of those."""
    seen = run("reading.py", work=prepared(work), pairs=5 if fast else 9)
    rows = {STEP: seen["steps"], LIMIT_OF + STEP: [1.0], READ: seen["reading"]}
    return rows | {"these kernels on one core, GFLOP/s": seen["rate"]}


def overhead(work: Path, fast: bool, turn: int) -> Rows:
    """Federation against the bare loop with the same replicas, many pairs in one process."""
    how: dict[str, Any] = {"work": prepared(work), "pairs": 5 if fast else 9} | SIDE
    seen = run("overhead.py", local_epochs=2, **how)
    pairs = list(zip(seen["federated"], seen["bare"], strict=True))
    rows = {BARE: [f / b for f, b in pairs], LIMIT_OF + BARE: [1.0]}
    share = seen["share"]
    rows[STALL] = [share.get("waiting for the checkpoint", 0.0)]
    rows |= {f"share of a round: {label}": [value] for label, value in share.items()}
    rows["federation's own time, s a round of 4 clients"] = [f - b for f, b in pairs]
    if not fast:
        held = run("overhead.py", local_epochs=2, **how | CACHED)
        pairs = list(zip(held["bare"], held["federated"], strict=True))
        rows |= {CACHED_ROUND: [b / f for b, f in pairs], LIMIT_OF + CACHED_ROUND: [1.0]}
    return rows | {"start-up before the first round, s": [seen["startup"]]}


def demo(work: Path, fast: bool, turn: int) -> Rows:
    """The demo as users run it, in an empty folder, alone and beside a process that fills a core."""
    arms = {
        how: functools.partial(run, "demo.py", work=str(work), how=how)
        for how in ("alone", "busy", "seeds")
    }
    seen = in_turn(arms, turn)
    rows = {DEMO: [seen["alone"]["seconds"]]}
    rows[BUSY] = [seen["busy"]["seconds"] / seen["alone"]["seconds"]]
    rows[DEMO_AUROC] = [min(seen["seeds"]["auroc"])]
    rows |= {f"make demo, seed {k}: AUROC": [v] for k, v in enumerate(seen["seeds"]["auroc"])}
    rows["make demo: a round, s"] = seen["alone"]["rounds"]
    return rows | {"make demo: peak memory, MB": [seen["alone"]["megabytes"]]}


def compared(
    work: Path, turn: int, rounds: int, peer: str, size: int = 64
) -> dict[str, dict[str, Any]]:
    """Run a peer, our arms and the bare loops of these on the comparison's films, in turn.

    Ours "plain" is one replica with all threads, as pfl trains; with a replica a core and a thread
    each, clients train side by side, as Flower's workers do.
    """
    folder = prepared(work, size)
    arms = {"peer": lambda: run(peer, work=folder, rounds=rounds)}
    changes = {"cached": SIDE | CACHED}
    if size == 64:
        changes |= {"plain": {}, "side": SIDE}
    if has_bf16():
        changes["bf16"] = SIDE | {"cache_features": True, "precision": "bf16"}
    for name, change in changes.items():
        arms[name] = lambda change=change: run("ours.py", work=folder, rounds=rounds, **change)
        arms[f"{name} bare"] = lambda change=change: run(
            "overhead.py", work=folder, pairs=rounds - 1, **change
        )
    return in_turn(arms, turn)


def per_round(arm: dict[str, Any]) -> float:
    """Return the median seconds of a round, the first, which warms up, left out."""
    return statistics.median(arm["rounds"][1:])


def faster(arms: dict[str, dict[str, Any]], name: str, row: str) -> Rows:
    """Make the row of how many of our rounds a peer's round takes, and what a bare loop would give."""
    peer, limit = per_round(arms["peer"]), statistics.median(arms[f"{name} bare"]["bare"])
    return {row: [peer / per_round(arms[name])], LIMIT_OF + row: [peer / limit]}


def need(package: str, name: str) -> None:
    """Raise Skip where a peer is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{name} is not installed: pip install -e '.[bench]'")


def against(peer: str, arms: dict[str, dict[str, Any]], where: str = "") -> Rows:
    """Make the rows of a comparison with a peer."""
    other, cached, rows = arms["peer"], cached_name(peer, where), {}
    for precision, arm in (("fp32", "cached"), ("bf16", "bf16")):
        if arm in arms:
            rows |= faster(arms, arm, f"{cached}, {precision}")
            rows[f"AUROC, that less {peer}{where}, {precision}"] = [
                arms[arm]["auroc"] - other["auroc"]
            ]
    return rows


def cached_name(peer: str, where: str) -> str:
    """Name the comparison of a peer with ours from cached features."""
    return f"{peer} / ours with the trunk cached, a round{where}"


def against_pfl(work: Path, fast: bool, turn: int) -> Rows:
    """Compare with pfl."""
    need("pfl", "pfl")
    arms = compared(work, turn, 3 if fast else 4, "peer_pfl.py")
    rows = faster(arms, "plain", PFL)
    rows[SIDE_GAIN] = [per_round(arms["plain"]) / per_round(arms["side"])]
    rows[CACHE_GAIN] = [per_round(arms["side"]) / per_round(arms["cached"])]
    names = {"peer": "pfl", "plain": "ours", "side": "ours, a replica a core"}
    names |= {"cached": "ours, trunk cached, fp32"}
    names |= {"bf16": "ours, trunk cached, bf16"}
    for name in [name for name in names if name in arms]:
        told = f"training films/s, validation included: {names[name]}"
        rows[told] = [FILMS / per_round(arms[name])]
        if name != "peer":
            rows[LIMIT_OF + told] = [FILMS / statistics.median(arms[f"{name} bare"]["bare"])]
    rows[PFL_MEMORY] = [arms["plain"]["megabytes"] / arms["peer"]["megabytes"]]
    return rows | against("pfl", arms)


def against_pfl_large(work: Path, fast: bool, turn: int) -> Rows:
    """Compare with pfl at 224 pixels, the size of the films on Kaggle."""
    need("pfl", "pfl")
    arms = compared(work, turn, 3, "peer_pfl.py", 224)
    return against("pfl", arms, LARGE)


def against_flower(work: Path, fast: bool, turn: int) -> Rows:
    """Compare with Flower on Ray."""
    need("ray", "Flower with Ray")
    arms = compared(work, turn, 5, "peer_flower.py")
    rows = {FLOWER_ALL: [arms["peer"]["total"] / arms["side"]["total"]]}
    rows |= faster(arms, "side", FLOWER_ROUND)
    rows["memory, ours / Flower"] = [arms["side"]["megabytes"] / arms["peer"]["megabytes"]]
    return rows | against("Flower", arms)


def kept_memory(work: Path, fast: bool, turn: int) -> Rows:
    """What it is worth that freed memory is not handed back to the kernel."""
    how: dict[str, Any] = {"work": prepared(work), "rounds": 3}
    rows = {}
    for name, change in {"uncached": {}, "cached": {"cache_features": True}}.items():
        kept, back = (
            lambda keep=keep, change=change: run("ours.py", keep_memory=keep, **how, **change)
            for keep in (True, False)
        )
        seen = in_turn({"kept": kept, "back": back}, turn)
        ratio = per_round(seen["back"]) / per_round(seen["kept"])
        rows[f"freed memory handed back / kept, a round, trunk {name}"] = [ratio]
    return rows


def handwritten(work: Path, fast: bool, turn: int) -> Rows:
    """From films on disk to the last round: 3 clients, 10 rounds, 6 local epochs, 224 pixels."""
    folder, kind = films_folder(work)
    if kind != "real films":
        raise Skip("NIH_TEST_DATA is not set: no real films")
    rounds, size, batch, epochs = 10, 224, 16, 6
    table, weights = work / "handwritten.csv", work / "handwritten.pth"
    write_handwritten(work, folder, table, weights)
    common: dict[str, Any] = {"clients": 3, "size": size, "rounds": rounds, "data": folder}
    common |= {"weights": str(weights), "local_epochs": epochs, "batch_size": batch}
    common |= {"batchnorm": "average", "cache_features": True} | SIDE

    def ours(**precision: str) -> dict[str, Any]:
        """Run our arm in an empty folder."""
        with tempfile.TemporaryDirectory(dir=work) as empty:
            return run("from_disk.py", work=empty, **common, **precision)

    how: dict[str, Any] = {"films": str(table), "weights": str(weights), "size": size}
    how |= {"batch": batch, "epochs": epochs, "rounds": rounds}
    arms = {"hand": lambda: run("peer_handwritten.py", **how)}
    arms["bound"] = lambda: run("bound.py", **how)
    arms["fp32"] = lambda: ours(precision="fp32", feature_dtype="fp32")
    if has_bf16():
        arms["bf16"] = lambda: ours(precision="bf16")
    return handwritten_rows(in_turn(arms, turn))


def handwritten_rows(seen: dict[str, dict[str, Any]]) -> Rows:
    """Make the rows: ratios in all, and what each part took."""
    hand, fp32 = seen["hand"], seen["fp32"]
    rows = {HAND: [hand["total"] / fp32["total"]]}
    rows[LIMIT_OF + HAND] = [hand["total"] / seen["bound"]["seconds"]]
    if "bf16" in seen:
        rows[HAND_BF16] = [hand["total"] / seen["bf16"]["total"]]
    rows["hand-written loop in all, s"] = [hand["total"]]
    rows["hand-written loop: share of decoding"] = [hand["decoding"] / sum(hand["rounds"])]
    rows["decoding, trunk and layer4 alone, s"] = [seen["bound"]["seconds"]]
    for name, arm in [(n, arm) for n, arm in seen.items() if n not in ("hand", "bound")]:
        rows[f"ours in all, {name}, s"] = [arm["total"]]
        rows[f"ours, {name}: decoding once, s"] = [arm["decoding"]]
        rows[f"ours, {name}: model, trunk once and first round, s"] = [arm["rounds"][0]]
        rows[f"ours, {name}: a later round, s"] = [per_round(arm)]
    return rows


def write_handwritten(work: Path, folder: str, table: Path, weights: Path) -> None:
    """Write what both arms read: which films each client trains on, and the first weights."""
    if table.is_file():
        return
    import torch
    import workload

    import fedutils

    data = fedutils.open_data(folder, work)
    films = data.table.assign(split=fedutils.split_patients(data.table, 0))
    placed = fedutils.partition_patients(films, "iid", 3, 0.5, 0).set_index("patient_id")["client"]
    films = films.assign(client=films["patient_id"].map(placed))
    films["path"] = [str(data.folder / path) for path in films["path"]]
    torch.save(workload.random_network().state_dict(), weights)
    films[films["split"] == "train"].to_csv(table, index=False)


def scale(work: Path, fast: bool, turn: int) -> Rows:
    """1,000 clients against 5 on the same films."""
    how: dict[str, Any] = {"batch_size": 32, "films": 64_000, "network": "small"}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        many, few = (
            lambda count=count: run("scale.py", work=folder, clients=count, **how)
            for count in (1000, 5)
        )
        seen = in_turn({"many": many, "few": few}, turn)
    keys = {SCALE_TIME: "seconds", SCALE_MEMORY: "own_megabytes"}
    return {name: [seen["many"][key] / seen["few"][key]] for name, key in keys.items()}


def scale_resnet(work: Path, fast: bool, turn: int) -> Rows:
    """What a client more costs with a ResNet-34, in milliseconds, the training apart."""
    how: dict[str, Any] = {"batch_size": 8, "films": 640, "network": "resnet34"}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        many, few = (run("scale.py", work=folder, clients=n, **how)["seconds"] for n in (40, 4))
    return {MILLISECONDS: [1000 * (many - few) / 36]}


FILMS = 768  # of the comparison, as in workload.py
DECODE = "decode once: notebook 02 / Pillow alone, films/s"
STEP = "training step: its kernels alone / ours"
READ = "reading a batch / the training step"
BARE = "federation / bare loop with the same replicas, a round"
CACHED_ROUND = "trunk cached, a round: bare loop / ours"
DEMO = "make demo after the install, s"
BUSY = "make demo beside one busy process / alone"
DEMO_AUROC = "make demo, mean test AUROC, the least of three seeds"
STALL = "waiting for a checkpoint / round"
SIDE: dict[str, Any] = {"device": "cpu", "threads": 0}  # as by default: a replica a core
CACHED: dict[str, Any] = {"cache_features": True, "feature_dtype": "fp32"}
PFL = "pfl / ours, same arithmetic, a round"
PFL_MEMORY = "memory, ours / pfl"
SIDE_GAIN = "ours, one replica / a replica a core, a round, fp32"
CACHE_GAIN = "ours without / with the trunk cached, a round, fp32"
FLOWER_ALL = "Flower / ours, same arithmetic, in all"
FLOWER_ROUND = "Flower / ours, same arithmetic, a round"
HAND = "hand-written loop / ours, from disk to last round, fp32"
HAND_BF16 = "hand-written loop / ours, from disk to last round, bf16"
LARGE = ", 224 pixels"
SCALE_TIME = "1,000 clients / 5 clients, time a round"
SCALE_MEMORY = "1,000 clients / 5 clients, memory"
MILLISECONDS = "ResNet-34: a client more, ms"


def peer_targets(peer: str, where: str = "") -> dict[str, str | None]:
    """Name the targets that are the same for both peers."""
    targets: dict[str, str | None] = {}
    for precision in ("fp32", "bf16"):
        if precision == "fp32" or has_bf16():
            targets[f"{cached_name(peer, where)}, {precision}"] = ">= 0.9 of the limit"
            targets[f"AUROC, that less {peer}{where}, {precision}"] = ">= -0.01"
    return targets


BENCHMARKS = {
    "demo": Bench(demo, {DEMO: "<= 240", BUSY: "<= 1.6", DEMO_AUROC: ">= 0.8"}, 1, 0),
    "decode": Bench(decoding, {DECODE: ">= 0.9"}, 3, 2),
    "step": Bench(reading, {STEP: ">= 0.95", READ: "< 0.02"}, 1, 1),
    "overhead": Bench(overhead, {BARE: "<= 1.02", STALL: "<= 0.05", CACHED_ROUND: ">= 0.9"}, 1, 1),
    "pfl": Bench(against_pfl, {PFL: ">= 0.98", PFL_MEMORY: "<= 1"} | peer_targets("pfl"), 3, 1),
    "pfl_224": Bench(against_pfl_large, peer_targets("pfl", LARGE), 3, 0),
    "flower": Bench(
        against_flower,
        {FLOWER_ALL: ">= 1.5", FLOWER_ROUND: ">= 1.3"} | peer_targets("Flower"),
        3,
        0,
    ),
    "memory": Bench(kept_memory, {}, 3, 0),
    "handwritten": Bench(handwritten, {HAND: ">= 0.9 of the limit", HAND_BF16: None}, 1, 0),
    "scale": Bench(scale, {SCALE_TIME: "<= 1.15", SCALE_MEMORY: "<= 1.10"}, 3, 0),
    "scale_resnet": Bench(scale_resnet, {MILLISECONDS: None}, 3, 0),
}


def line(result: Result) -> str:
    """Write one row of the table."""
    met = {True: "yes", False: "NO", None: "-"}[result.met]
    if result.measured is None:
        return f"| {result.name} | {result.note} | - | - | {result.target or '-'} | {met} |"
    low, high = result.interval or (result.measured, result.measured)
    spread = f" ({low:.3g} to {high:.3g}, n={result.pairs})" if result.pairs > 1 else ""
    limit, near = "-", "-"
    if result.limit:
        limit, near = f"{result.limit:.3g}", f"{result.share:.0%}"
    cells = (result.name, f"{result.measured:.3g}{spread}", limit, near, result.target or "-", met)
    return f"| {' | '.join(cells)} |"


def show(results: Iterable[Result]) -> None:
    """Print the table, with date and machine."""
    about = (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {processor()}, {platform.system()}"
    )
    heads = ("what", "measured", "limit", "of it", "target", "met")
    print(f"\n{about}\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    print("\n".join(line(result) for result in results), flush=True)


def processor() -> str:
    """Name the processor."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [row.split(":", 1)[1].strip() for row in about.splitlines() if "model name" in row]
    return (names or [platform.processor()])[0]


def main() -> int:
    """Measure, print, write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="the half that takes under 9 minutes")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    chosen, results = parser.parse_args(), []
    work = ROOT / "work"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=work) as scratch:
        for name in chosen.only:
            bench = BENCHMARKS[name]
            if bench.fast_calls or not chosen.fast:
                began = time.perf_counter()
                results += measure(bench, Path(scratch), chosen.fast)
                rows = [asdict(result) for result in results]
                (work / "bench.json").write_text(json.dumps(rows, indent=1))
                print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    show(results)
    missed = [result.name for result in results if result.met is False]
    print(f"\nmissed: {'; '.join(missed)}" if missed else "\nNo target was missed.")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
