"""Does the working tree train and evaluate to the bits of another revision of the code?

`python tests/bench/same_bits.py REV` does the small runs of `small_runs.py` with both, side by side
on this machine, a thread each, and compares hashes of states, tables, predictions and decoded
films. Each difference is a line, and the exit status is then 1.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

import small_runs
from small_runs import NEEDS, RUNS, SHA, Result

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def compare(before: dict[str, Result], now: dict[str, Result]) -> list[str]:
    """Name each difference of two sets of runs in a line: run, then file, or model and round.

    A run that failed or is missing is a difference, on both sides too: nothing was compared.
    """
    lines = []
    for run in before | now:
        sides = {"the revision": before.get(run), "the working tree": now.get(run)}
        faults = {k: "missing" if not v else v.get("error") for k, v in sides.items()}
        lines += [f"{run}: with {side}: {fault}" for side, fault in faults.items() if fault]
        if not any(faults.values()):
            old, new = sides.values()
            changed = [name for name in old | new if old.get(name) != new.get(name)]
            lines += [f"{run}: {name}: {tell(old.get(name), new.get(name))}" for name in changed]
    return lines


def tell(old: str | None, new: str | None) -> str:
    """Show the first line in which two texts differ."""
    if old is None or new is None:
        return f"only with the {'working tree' if old is None else 'revision'}"
    pairs = itertools.zip_longest(old.split("\n"), new.split("\n"), fillvalue="nothing")
    number, pair = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return f"line {number} was {pair[0]!r}, is {pair[1]!r}"


def start(tree: Path, names: list[str], out: Path) -> subprocess.Popen:
    """Begin the runs with the package that lies in a tree."""
    command = [sys.executable, small_runs.__file__, "--only", ",".join(names), "--out", str(out)]
    environment = os.environ | ALONE | {"PYTHONPATH": str(tree), "TMPDIR": str(out.parent)}
    return subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL)


def run_both(revision: str, names: list[str], folder: Path) -> list[dict[str, Result]]:
    """Do the runs with the revision and with the working tree, side by side."""
    command = ["git", "archive", revision]
    archive = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE)
    if archive.returncode:
        sys.exit(2)  # git has said why
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder / "tree", filter="data")
    outs = {folder / "before.json": folder / "tree", folder / "now.json": ROOT}
    children = [start(tree, names, out) for out, tree in outs.items()]
    try:
        if any([child.wait() for child in children]):
            raise SystemExit("the runs did not end, see above")
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [json.loads(out.read_text()) for out in outs]


def main() -> int:
    """Compare, print each difference, and return 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="of git, such as HEAD or main")
    parser.add_argument("--only", default=",".join(RUNS), help="some of: %(default)s")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := sorted(set(names) - RUNS.keys()):
        parser.error(f"--only: unknown {', '.join(unknown)}; there are {', '.join(RUNS)}")
    for name in [name for name in names if name in NEEDS and not find_spec(NEEDS[name])]:
        print(f"left out: {name}, {NEEDS[name]} is not installed")
        names.remove(name)
    with tempfile.TemporaryDirectory() as folder:
        before, now = run_both(given.revision, names, Path(folder))
    lines, compared = compare(before, now), [name for found in now.values() for name in found]
    for line in lines:
        print(line)
    hashes = sum(name.startswith(SHA) for name in compared)
    counts = f"{len(names)} runs, {hashes} hashes of states, {len(compared) - hashes} files"
    print(f"{len(lines) or 'no'} differences from {given.revision} in {counts}")
    return int(bool(lines) or not compared)


if __name__ == "__main__":
    sys.exit(main())
