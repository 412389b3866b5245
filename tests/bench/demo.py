"""The demo as `make demo` runs it, in an empty folder: timed, timed beside a busy process, or seeds."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import workload

from fedutils import read_history
from fedutils.evidence.tables import mean_auroc_rows, read_table


def burn() -> None:
    """Keep a core busy."""
    while True:
        sum(range(1_000_000))


def main(work: str, how: str) -> None:
    """Run it: `how` is `alone`, `busy`, or `seeds` for the AUROC of three."""
    other = multiprocessing.Process(target=burn, daemon=True)
    if how == "busy":
        other.start()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        command = [sys.executable, "-m", "fedutils", "run", "--profile", "demo", "--work", folder]
        command += ["-p", "seeds=0,1,2"] if how == "seeds" else []
        laps = workload.Laps()
        subprocess.run(command, check=True, env=os.environ | {"NIH_DATA_DIR": ""})
        laps.lap()
        (run,) = Path(folder).glob("runs/*")
        rounds = read_history(run).query("client == ''")["seconds"].tolist()
        found = mean_auroc_rows(read_table(run / "evaluation" / "metrics.csv"), test_set="all")
    if how == "busy":
        other.terminate()
    auroc = found[found["seed"] != ""]["value"].tolist()
    workload.report(seconds=laps.seconds[0], rounds=rounds, auroc=auroc)


if __name__ == "__main__":
    main(**workload.arguments())
