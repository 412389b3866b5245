"""The frozen trunk computed once: the same training, a store that heals, and says what it takes."""

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_federation import NAMES, STRATEGIES, aggregated, hashes
from tiny import tiny_films, tiny_settings

from fedutils.base.errors import InputError
from fedutils.base.threads import Shared
from fedutils.evidence.predict import predict_films
from fedutils.films.phantom.cases import FINDINGS
from fedutils.model import build_resnet34
from fedutils.training import features
from fedutils.training.features import BLOCK, FeatureStore, find_scratch
from fedutils.training.training import Training

FROZEN = {"tracked": "layer4,fc", "augment": False, "feature_dtype": "fp32"}
FILMS = 3 * BLOCK - 50


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def train(work, films=60, **changes):
    settings = tiny_settings(work, **(FROZEN | changes))
    return Training(settings, tiny_films(work, films)).train()


def open_store(work, model=None, fingerprint="tiny", size=32, films=FILMS, **changes):
    settings = tiny_settings(work, cache_features=True, **(FROZEN | changes))
    model = model or build_resnet34("none", "layer4,fc", outputs=14)
    return FeatureStore(Shared([model]), tiny_films(work, films, size=size), settings, fingerprint)


LAYERS = ["fc" if name in ("fedavgm", "fedadam", "fedprox") else "layer4,fc" for name in NAMES]
LAYERS[-2:] = ["fc", "fc"]  # training layer4 takes a while, and shows nothing new there


@pytest.mark.parametrize(
    ("changes", "tracked"), list(zip(STRATEGIES, LAYERS, strict=True)), ids=NAMES
)
def test_fp32_features_train_to_the_bits_of_films(tmp_path, changes, tracked):
    changes = changes | {"rounds": 1, "tracked": tracked}
    plain = train(tmp_path / "plain", 30, **changes)  # apart, or the second would share its model
    cached = train(tmp_path / "cached", 30, cache_features=True, **changes)
    assert hashes(cached) == hashes(plain)
    assert cached.drop(columns="seconds").equals(plain.drop(columns="seconds"))
    models = [
        load_file(tmp_path / name / "runs/run/models/federated-s0.safetensors")
        for name in ("plain", "cached")
    ]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def test_all_arms_and_seeds_share_one_store(tmp_path):
    changes = {"arms": "federated,centralised,local", "seeds": "0,1", "rounds": 1, "tracked": "fc"}
    plain = train(tmp_path / "plain", **changes)
    cached = train(tmp_path / "cached", cache_features=True, **changes)
    assert hashes(cached) == hashes(plain)
    assert len(list((tmp_path / "cached/prepared").glob("features-*.npy"))) == 1


def test_a_run_goes_on_with_and_without_the_cache(tmp_path):
    straight = train(tmp_path, 30, name="straight", tracked="fc")
    train(tmp_path, 30, name="run", rounds=1, tracked="fc")
    resumed = train(tmp_path, 30, name="run", tracked="fc", cache_features=True)
    assert hashes(resumed) == hashes(straight)


def test_test_films_are_predicted_from_features_too(tmp_path):
    changes = FROZEN | {"tracked": "fc"}
    train(tmp_path, cache_features=True, rounds=1, tracked="fc")
    settings, films = tiny_settings(tmp_path, **changes), tiny_films(tmp_path)
    cached = dataclasses.replace(settings, cache_features=True)
    plain, table = (predict_films(s, films, "test")[list(FINDINGS)] for s in (settings, cached))
    assert table.equals(plain)
    for store in (tmp_path / "prepared").glob("features-*"):
        store.unlink()
    assert predict_films(cached, films, "test")[list(FINDINGS)].equals(plain)


def test_half_precision_features_are_close_and_half_the_size(tmp_path):
    full, half = open_store(tmp_path), open_store(tmp_path, feature_dtype="fp16")
    a, b = full.fill(), half.fill()
    assert a.dtype == np.float32 and b.dtype == np.float16 and a.shape == b.shape
    assert np.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert half.gigabytes == full.gigabytes / 2 and full.path != half.path
    loss = aggregated(train(tmp_path, name="a", rounds=1))["val_loss"].item()
    changes = {"name": "b", "cache_features": True, "feature_dtype": "fp16"}
    assert aggregated(train(tmp_path, rounds=1, **changes))["val_loss"].item() == pytest.approx(
        loss, rel=0.02
    )


def test_features_stand_in_the_order_of_the_store_whatever_the_batch(tmp_path):
    model, store = build_resnet34("none", "layer4,fc", outputs=14).eval(), open_store(tmp_path)
    features = store.fill()
    rows = np.array([141, 3, 77])
    films = torch.from_numpy(tiny_films(tmp_path, FILMS).store[rows])[:, None]
    with torch.no_grad():
        expected = model.features(films)
    assert np.array_equal(features[rows], expected.permute(0, 2, 3, 1).numpy())
    assert features.shape == (FILMS, 2, 2, 256)


def test_another_trunk_data_size_or_dtype_is_another_store(tmp_path):
    first = open_store(tmp_path).path
    assert open_store(tmp_path).path == first
    head = build_resnet34("none", "layer4,fc", outputs=14)
    with torch.no_grad():
        head.layer4[0].conv1.weight.add_(1)
        head.fc.bias.add_(1)
    assert open_store(tmp_path, head).path == first
    trunk = build_resnet34("none", "layer4,fc", outputs=14)
    trunk.layer1[0].bn1.running_mean[0] += 1e-6
    others = {
        open_store(tmp_path, trunk).path,
        open_store(tmp_path, fingerprint="other").path,
        open_store(tmp_path, size=64).path,
        open_store(tmp_path, feature_dtype="fp16").path,
        open_store(
            tmp_path, build_resnet34("none", "layer4,fc", precision="bf16", outputs=14)
        ).path,
    }
    assert len(others) == 5 and first not in others


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1], sys.argv[1] + "/training"
import test_features as tests
import torch
torch.set_num_threads(1)  # as here: a random trunk's calibration depends on it in the last bits
store = tests.open_store(Path(sys.argv[2]))
store.fill(lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_values(tmp_path):
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), str(tmp_path / "a")]
    assert subprocess.run(command).returncode == -9
    store, seen = open_store(tmp_path / "a"), []
    assert store.missing == [1, 2] and store.open() is None
    values = store.fill(lambda done, total: seen.append((done, total)))
    assert len(seen) == 2 and seen[-1] == (FILMS, FILMS)
    assert np.array_equal(values, open_store(tmp_path / "b").fill())
    assert open_store(tmp_path / "a").seconds_left() == 0


def test_a_damaged_block_is_found_and_only_that_is_computed_again(tmp_path):
    expected = np.array(open_store(tmp_path).fill())
    with open_store(tmp_path).path.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x00\x01\x02\x03")
    with pytest.warns(UserWarning, match=r"features-.*npy: films .* to 142 are damaged"):
        store = open_store(tmp_path)
    assert store.missing == [2]
    assert np.array_equal(store.fill(), expected)


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_file_that_is_something_else_is_computed_again_with_a_warning(tmp_path, content):
    store = open_store(tmp_path)
    expected = np.array(store.fill())
    if content is None:
        np.save(store.path, np.zeros((3, 4)))
    else:
        store.path.write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be used"):
        again = open_store(tmp_path)
    assert np.array_equal(again.fill(), expected)


def test_too_little_disk_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "features-old.npy").touch()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(InputError, match=r"needs 0.0 GB in .*prepared.*features-old.npy"):
        train(tmp_path, cache_features=True)
    assert not [p for p in (tmp_path / "prepared").glob("features-*.npy") if p.stat().st_size]


def test_too_little_time_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureStore, "seconds_left", lambda self: 7200.0)
    with pytest.raises(InputError, match=r"max_hours=0.5: features alone take about 2.00 h"):
        train(tmp_path, cache_features=True, max_hours=0.5)


def test_values_too_large_for_half_precision_are_refused(tmp_path):
    model = build_resnet34("none", "layer4,fc", outputs=14)
    model.layer3[5].bn2.bias.data.fill_(1e6)
    with pytest.raises(InputError, match="feature_dtype=fp32"):
        open_store(tmp_path, model, feature_dtype="fp16").fill()


def test_it_says_what_it_takes_and_the_estimate_holds_it(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path, cache_features=True, rounds=1, **FROZEN)
    training = Training(settings, tiny_films(tmp_path))
    assert "60 films takes 0.00 GB as float32 in prepared/: 60 of them" in (
        training.features.describe()
    )
    assert training.features.seconds_left() > 0
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "seconds_left", lambda self: 7200.0)
        assert training.estimate_seconds() > 7200
    training.train()
    again = Training(settings, tiny_films(tmp_path))
    assert again.features.describe().endswith("all of it is there.")
    assert again.estimate_seconds() == 0


def test_on_kaggle_features_go_where_nothing_is_saved(tmp_path, monkeypatch):
    assert find_scratch(tmp_path) == tmp_path
    monkeypatch.setattr(features, "KAGGLE_WORKING", tmp_path)
    monkeypatch.setattr(features, "KAGGLE_TEMP", tmp_path / "temp")
    assert find_scratch(tmp_path) == Path(tempfile.gettempdir())
    (tmp_path / "temp").mkdir()
    assert find_scratch(tmp_path) == tmp_path / "temp"


def test_the_journal_is_plain_and_small(tmp_path):
    store = open_store(tmp_path)
    store.fill()
    assert len(json.loads(store.path.with_suffix(".json").read_text())) == 3
