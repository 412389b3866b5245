"""A tiny prepared data set, made without decoding anything, for tests of the federation."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from fedutils.dataset import ChestXrayDataset, read_index
from fedutils.films.decode import INDEX_COLUMNS
from fedutils.films.phantom.cases import FINDINGS
from fedutils.settings import Settings, read_parameters

# How far float32 takes the network's logits, or its gradient, from the exact ones, as a share of
# their norm, on any processor: 36 layers there and 36 back, in each sums of up to 9 * 512 products,
# and as many roundings, which add up like a random walk. It is 7e-5; measured are 4e-7 to 6e-6.
ROUNDING = torch.finfo(torch.float32).eps * math.sqrt(2 * 36 * 9 * 512)


TINY = {"declared": {"": FINDINGS}}  # what is in each report


def tiny_settings(work: Path, **changes) -> Settings:
    """Settings of a run that takes a second: 32-pixel films, a small tracked state, one thread."""
    values = {"work_dir": str(work), "profile": "demo", "image_size": 32, "num_clients": 3}
    values["lr"] = 1e-3
    values |= {
        "tracked": "layer1,fc",
        "batch_size": 8,
        "rounds": 2,
        "threads": 1,
        "device": "cpu",
        "name": "run",
    }
    return read_parameters(values | changes)


def tiny_films(work: Path, films: int = 60, clients: int = 3, size: int = 32) -> ChestXrayDataset:
    """Random films of which each finding brightens its own stripe; index with `client`, `split`."""
    prepared = work / "prepared"
    prepared.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = rng.random((films, len(FINDINGS))) < 0.4
    pixels = rng.integers(0, 100, (films, size, size), dtype=np.uint8)
    for finding in range(len(FINDINGS)):
        pixels[labels[:, finding], 2 * finding : 2 * finding + 2] += 120
    np.save(prepared / "images.npy", pixels)
    index = pd.DataFrame(labels.astype(int), columns=FINDINGS)
    patient = np.arange(films)
    about = {
        "image_index": [f"{p:08d}_000.png" for p in patient],
        "row": patient,
        "source": "",
        "patient_id": patient.astype(str),
        "follow_up": 0,
        "age": 50,
        "sex": "F",
        "view": "PA",
        "scanner": "0.143",
        "split": np.array(["train", "train", "train", "val", "test"])[patient % 5],
    }
    for name in reversed(INDEX_COLUMNS):
        index.insert(0, name, about[name])
    index.to_csv(prepared / "index.csv", index=False)
    (prepared / "report.json").write_text(
        json.dumps(TINY | {"fingerprint": "tiny", "labels_by": "Labels were drawn."})
    )
    index = read_index(prepared).assign(client=[f"client-{1 + p // 5 % clients}" for p in patient])
    return ChestXrayDataset(prepared, index)


def tiny_homes(folder: Path, films: ChestXrayDataset) -> dict[str, Path]:
    """A work folder for each client, in which its own films alone are prepared."""
    homes = {}
    for name, index in films.index.groupby("client"):
        homes[name], prepared = folder / name, folder / name / "prepared"
        prepared.mkdir(parents=True)
        np.save(prepared / "images.npy", films.store[index["row"]])
        own = index.drop(columns="client").assign(row=np.arange(len(index)))
        own.to_csv(prepared / "index.csv", index=False)
        about = TINY | {"seed": 0, "image_size": films.store.shape[1], "fingerprint": name}
        (prepared / "report.json").write_text(json.dumps(about))
    return homes


def smooth(model: nn.Module) -> nn.Module:
    """Replace each ReLU, so that a rounding error in the input is one in the gradient, too.

    A ReLU's gradient jumps: where its input is 0 but for rounding, the processor chooses between
    two gradients that differ by thousandths of their norm. Two paths can then be compared with
    nothing but luck.
    """
    for module in list(model.modules()):
        if hasattr(module, "relu"):
            module.relu = nn.SiLU()
    return model


def fake_gpus(monkeypatch, count, capability=(7, 5), arches=("sm_70", "sm_75", "sm_80")) -> None:
    """Let torch tell of GPUs that are not there; nothing can run on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(arches))
