"""Our arm from films on disk to the last round: decode once, the trunk once, then the rounds."""

from pathlib import Path
from typing import Any

import workload

from fedutils import ChestXrayDataset, Training


def main(work: str, data: str, clients: int, size: int, rounds: int, **changes: Any) -> None:
    """Decode, place, train; the seconds of each part."""
    laps = workload.Laps()
    workload.decode(data, Path(work), size)
    index = workload.place(Path(work) / "prepared", clients)
    laps.lap()
    changes |= {"image_size": size, "num_clients": clients, "rounds": rounds}
    settings = workload.settings(Path(work), **changes)
    training = Training(settings, ChestXrayDataset(settings.prepared, index))
    training.train(lambda row, history: laps.lap())
    workload.report(decoding=laps.seconds[0], rounds=laps.seconds[1:])


if __name__ == "__main__":
    main(**workload.arguments())
