"""All of NIH without its films: what a plan of 3 arms, 3 partitions and 3 seeds takes, and memory.

`python tests/bench/full_size.py` writes a store of 112,120 films of 224 pixels, which are holes in
a sparse file, with an index as NIH's, and one of a tenth; on each it does what comes before the
first round, and prints seconds and memory.
Only what is told apart by films may grow with them. The hours are those of training, by a few
batches timed on this machine: without decoding, reading the trunk's output from the disk, and
notebook 04.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import fedutils
from fedutils.films.decode import INDEX_COLUMNS
from fedutils.films.phantom.cases import FINDINGS

FILMS, PATIENTS, SIZE = 112_120, 30_805, 224
CLIENTS, ROUNDS, SEEDS = 5, 10, "0,1,2"
PARTITIONS = ("iid", "dirichlet", "scanner")
SCANNERS = ("0.143", "0.168", "0.139", "0.171", "0.194")


def write_store(work: Path, films: int) -> None:
    """Write a store that takes no room, and an index of random patients, findings and scanners."""
    prepared, rng = work / "prepared", np.random.default_rng(0)
    prepared.mkdir(parents=True)
    shape = (films, SIZE, SIZE)
    np.lib.format.open_memmap(prepared / "images.npy", "w+", np.uint8, shape).flush()
    patient = np.sort(rng.integers(0, PATIENTS * films // FILMS, films))
    index = pd.DataFrame(rng.random((films, 14)) < 0.06, columns=FINDINGS).astype(int)
    about = {
        "image_index": [f"{number:08d}_{k:06d}.png" for k, number in enumerate(patient)],
        "row": np.arange(films), "source": "", "patient_id": patient.astype(str), "follow_up": 0, "age": 50,
        "sex": "F", "view": "PA", "scanner": rng.choice(SCANNERS, films),
        "split": np.array(["train"] * 7 + ["val"] + ["test"] * 2)[patient % 10],
    }  # fmt: skip
    index.assign(**about)[[*INDEX_COLUMNS, *FINDINGS]].to_csv(prepared / "index.csv", index=False)
    stated = {"fingerprint": "random", "image_size": SIZE, "seed": 0, "lists": []}
    (prepared / "report.json").write_text(json.dumps(stated))


def measure(work: Path) -> dict[str, float]:
    """Do what comes before the first round; return seconds, megabytes, and the hours of the plan."""
    began, index = time.perf_counter(), fedutils.read_index(work / "prepared")
    seen, hours = {"read the index, s": time.perf_counter() - began}, 0.0
    for number, partition in enumerate(PARTITIONS):
        began = time.perf_counter()
        placed = fedutils.partition_patients(index, partition, CLIENTS, 0.5, 0)
        seen[f"{partition}: place patients, s"] = time.perf_counter() - began
        clients = index["patient_id"].map(placed.set_index("patient_id")["client"])
        films = fedutils.ChestXrayDataset(work / "prepared", index.assign(client=clients))
        values = {"work_dir": str(work), "profile": "demo", "name": partition, "weights": "none"}
        values |= {"image_size": SIZE, "num_clients": CLIENTS, "partition": partition}
        values |= {"tracked": "layer4,fc", "rounds": ROUNDS, "seeds": SEEDS, "batch_size": 64}
        values |= {"arms": "federated,centralised,local" if not number else "federated,local"}
        settings = fedutils.read_parameters(
            values | {"cache_features": True, "augment": False, "device": "cpu"}
        )
        began = time.perf_counter()
        training = fedutils.Training(settings, films)
        seen[f"{partition}: plan {len(training.jobs)} models, s"] = time.perf_counter() - began
        hours += training.estimate_seconds() / 3600
        hours -= training.features.seconds_left() / 3600 if number else 0.0  # shared by all
    seen["the plan on this machine, h"] = hours
    seen["films on disk, GB"] = films.store.nbytes / 1e9
    seen["what the trunk made of them on disk, GB"] = 2 * np.prod(training.features.shape) / 1e9
    seen["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seen


def main() -> None:
    """Measure a tenth and all, each in a process of its own; print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=Path, help="measure this folder; print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    columns, work = {}, Path(__file__).parents[2] / "work"
    work.mkdir(exist_ok=True)
    for films in (FILMS // 10, FILMS):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            write_store(Path(folder), films)
            command = [sys.executable, __file__, "--one", folder]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            columns[f"{films:,} films"] = json.loads(said.splitlines()[-1])
    print(pd.DataFrame(columns).to_string(float_format="{:,.1f}".format))


if __name__ == "__main__":
    main()
