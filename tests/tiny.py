"""A tiny prepared data set, made without decoding anything, for tests of the federation."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fedutils.findings import FINDINGS
from fedutils.images import INDEX_COLUMNS, ChestXrayDataset, read_index
from fedutils.settings import Settings, read_parameters


def tiny_settings(work: Path, **changes) -> Settings:
    """Settings of a run that takes a second: 32-pixel films, a small tracked state, one thread."""
    values = {"work_dir": str(work), "profile": "demo", "image_size": 32, "num_clients": 3}
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
    (prepared / "report.json").write_text(json.dumps({"fingerprint": "tiny"}))
    index = read_index(prepared).assign(client=[f"client-{1 + p // 5 % clients}" for p in patient])
    return ChestXrayDataset(prepared, index)


def fake_gpus(monkeypatch, count, capability=(7, 5), arches=("sm_70", "sm_75", "sm_80")) -> None:
    """Let torch tell of GPUs that are not there; nothing can run on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(arches))
