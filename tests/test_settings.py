"""Parameters: types, profiles, names of runs."""

import subprocess
import sys

import pytest
import torch
from ownfilms import write_films
from tiny import fake_gpus, tiny_settings

from fedutils.base import weights
from fedutils.base.errors import InputError
from fedutils.base.files import ROOT_MARKER, find_root
from fedutils.batch.trained import read_evaluated, read_run
from fedutils.settings import (
    convert_texts,
    find_profile,
    read_parameters,
)
from fedutils.training.identity import open_run


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("NIH_DATA_DIR", raising=False)


def test_empty_parameters_take_the_profiles_values():
    demo = read_parameters({"profile": "demo"})
    assert (demo.image_size, demo.weights, demo.tracked) == (64, "none", "all")
    assert (demo.num_clients, demo.rounds, demo.batch_size, demo.lr) == (4, 4, 32, 4e-4)
    kaggle = read_parameters({"profile": "kaggle"})
    assert (kaggle.num_clients, kaggle.rounds, kaggle.batch_size, kaggle.lr) == (5, 15, 64, 1e-3)
    assert read_parameters({"profile": "kaggle", "weights": "none"}).lr == 4e-4
    assert read_parameters({"profile": "demo", "image_size": 96}).image_size == 96
    assert read_parameters({"profile": "demo", "strategy": "fedadam"}).server_lr == 0.01


def test_auto_is_the_demo_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_parameters({}).profile == "demo"


def test_names_of_a_notebook_that_are_no_parameters_are_ignored():
    assert read_parameters({"profile": "demo", "__name__": "x", "title": 3}).seed == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": "many"}, "rounds='many': expected int"),
        ({"rounds": 2.5}, "rounds=2.5: expected int"),
        ({"rounds": -1}, "rounds=-1: allowed is 1 to"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"strategy": "fedsgd"}, "strategy='fedsgd': allowed are fedavg"),
        ({"profile": "gpu"}, "profile='gpu'"),
        ({"arms": "federated,central"}, "arms='federated,central'"),
        ({"seeds": "0,x"}, "seeds='0,x'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"weights": "/no/such/file.pth"}, "no such file"),
        ({"data_dir": "/no/such/folder"}, "data_dir: folder /no/such/folder cannot be read"),
        ({"strategy": "scaffold"}, "strategy=scaffold wants optimizer=sgd momentum=0"),
        ({"tracked": "layer5"}, "tracked='layer5'"),
        ({"augment": "perhaps"}, "augment='perhaps': expected true or false"),
        ({"augment": 1}, "augment=1: expected true or false"),
        ({"precision": "fp8"}, "precision='fp8': allowed are auto, fp32"),
        ({"cache_features": True}, "cache_features=true wants augment=false"),
        ({"cache_features": True, "augment": False}, "wants tracked=layer4,fc, not 'all'"),
    ],
)
def test_a_wrong_value_names_the_parameter_and_what_is_allowed(values, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        read_parameters({"profile": "demo", "device": "cpu"} | values)


def convert(name, value):
    return convert_texts({name: value})[name]


def test_text_from_the_command_line_is_converted_by_type():
    assert convert("rounds", "12") == 12 and convert("lr", "1e-4") == 1e-4
    with pytest.raises(InputError, match=r"unknown parameter 'round'; did you mean rounds\?"):
        convert("round", "12")


def test_truth_values_are_text_on_the_command_line():
    assert convert("augment", "false") is False and convert("augment", "True") is True
    assert convert("cache_features", True) is True
    with pytest.raises(InputError, match="rounds=True: expected int"):
        convert("rounds", True)


def test_another_parameter_is_another_run_but_rounds_and_device_go_on(tmp_path):
    def name(**changes):
        return read_parameters({"profile": "demo", "work_dir": str(tmp_path)} | changes).name

    first = name()
    assert name(rounds=99) == name(device="cpu") == name(max_hours=3.0) == first
    frozen = {"tracked": "layer4,fc", "augment": False}
    assert name(cache_features=True, **frozen) == name(**frozen) != first
    assert first not in {
        name(precision="bf16"),
        name(augment=False),
        name(feature_dtype="fp32", cache_features=True, **frozen),
    }
    others = {name(lr=0.1), name(seeds="0,1"), name(partition="scanner"), name(image_size=32)}
    assert first not in others and len(others) == 4


def test_read_run_finds_the_named_or_the_latest_run(tmp_path):
    from tiny import tiny_films

    from fedutils.training.training import Training

    for name in ("a", "b"):
        Training(tiny_settings(tmp_path, name=name, lr=0.01), tiny_films(tmp_path))
    assert read_run(str(tmp_path), "a").name == "a"
    assert read_run(str(tmp_path)).name == "b" and read_run(str(tmp_path)).lr == 0.01
    with pytest.raises(InputError, match="run notebook 03"):
        read_run(str(tmp_path), "c")


@pytest.mark.parametrize(
    ("cell", "refused"),
    [
        ("", ""), ("seed = 7", ""), ("seed = 0", "seed=0: run A was trained with 7"),
        ("data_dir = 'own/'", ""), ("data_dir = ''", "data_dir='phantom': run A was trained with 'own'"),
        ("data_dir = 'other'", "data_dir='other'"),
        ("image_size = 0; tracked = ''; weights = ''; profile = 'auto'; rounds = 0", ""),
        ("profile = 'kaggle'", "image_size=224: run A was trained with 32"),
        ("rounds = 99", "rounds=99: run A was trained with 0"), ("max_hours = 3.0", "only training"),
        ("image_size = 64", "image_size=64: run A was trained with 32"),
        ("tracked = 'fc'", "tracked='fc': run A was trained with 'all'"),
        ("weights = 'imagenet'", "weights='imagenet'"), ("arms = 'local'", "arms='local'"),
        ("sede = 7", "did you mean seed"),
    ],
)  # fmt: skip
def test_04_refuses_what_papermill_gives_and_the_run_was_not_trained_with(
    tmp_path, monkeypatch, cell, refused
):
    monkeypatch.chdir(tmp_path)
    write_films(tmp_path / "own")
    write_films(tmp_path / "other")
    how = {"data_dir": "own", "seed": 7, "name": "A", "tracked": "all"}
    open_run(tiny_settings(tmp_path, **how), "FedAvg", "data")
    given, cell = {}, cell.replace("; ", "\n")
    exec(cell, {}, given)
    shown = {"work_dir": str(tmp_path), "name": "A", "device": "cpu", "cache_features": False}
    values = shown | {"compare": "B, C"} | given | {"In": ["", f"# Parameters\n{cell}"]}
    if refused:
        with pytest.raises(InputError, match=refused):
            read_evaluated(values)
    else:
        settings = read_evaluated(values)
        assert settings.seed == 7 and settings.compared == ["B", "C"]


def test_gpu_with_weights_is_the_kaggle_profile(monkeypatch, tmp_path):
    fake_gpus(monkeypatch, 1)
    monkeypatch.setattr(weights, "find_weights", lambda name: tmp_path)
    assert find_profile() == "kaggle"
    kaggle = read_parameters({})
    assert (kaggle.image_size, kaggle.weights, kaggle.tracked) == (224, "imagenet", "layer4,fc")


IMPORT = """
import sys, time
import pandas, safetensors.torch, torch, torchvision
libraries, before = time.process_time(), set(sys.modules)
import fedutils
print((time.process_time() - libraries) / libraries)
print(*{name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""


def test_importing_fedutils_takes_a_tenth_of_what_its_libraries_take_and_loads_no_other():
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    share, loaded = zip(*(run.stdout.splitlines() for run in runs), strict=True)
    assert set(loaded) == {"fedutils"}
    assert min(map(float, share)) < 0.1


def test_root_is_found_by_its_marker(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / ROOT_MARKER).touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert find_root() == tmp_path
