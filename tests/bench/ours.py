"""Our arm: the project as it is used, in a process of its own."""

import shutil
from pathlib import Path
from typing import Any

import workload

from fedutils import Training
from fedutils.base import device


def main(work: str, rounds: int, keep_memory: bool = True, **changes: Any) -> None:
    """Train from the prepared films to the last round; `changes` are parameters of the run.

    Without `keep_memory` glibc does as it does by default.
    """
    if not keep_memory:
        device.keep_freed_memory = lambda: False
    settings = workload.settings(Path(work), rounds=rounds, **changes)
    shutil.rmtree(settings.run, ignore_errors=True)
    training, laps = Training(settings, workload.films(Path(work))), workload.Laps()
    history = training.train(lambda row, history: laps.lap())
    whole = history[history["client"] == ""]
    workload.report(rounds=laps.seconds, auroc=whole["val_auroc"].iloc[-1])


if __name__ == "__main__":
    main(**workload.arguments())
