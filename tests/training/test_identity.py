"""A run is what its result depends on; what trained it, and where, is written down."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from tiny import tiny_films, tiny_settings

from fedutils.base import files, provenance
from fedutils.base.errors import InputError
from fedutils.client import Client
from fedutils.evidence.tables import adopted_models
from fedutils.fedavg import FedAvg
from fedutils.run import read_history
from fedutils.settings import read_parameters
from fedutils.training import identity, replicas
from fedutils.training.training import Training


def train(work, strategy=None, **changes):
    settings = tiny_settings(work, **{"rounds": 1} | changes)
    return Training(settings, tiny_films(work), strategy).train()


def config(work, name="run"):
    return json.loads((work / f"runs/{name}/config.json").read_text())


def test_other_code_is_another_run_and_its_models_are_not_adopted(tmp_path, monkeypatch):
    """Before, a loss of zero gave the old model under a new name."""
    before = read_parameters({"profile": "demo"}).name
    train(tmp_path, name="old")
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "code_hash", lambda: "changed")
        assert read_parameters({"profile": "demo"}).name != before
        with pytest.raises(InputError, match=r"code='.*', not 'changed'"):
            train(tmp_path, name="old")
        trained = []
        fit = Client.fit
        patch.setattr(Client, "fit", lambda s, *a: (trained.append(s.name), fit(s, *a))[1])
        history = train(tmp_path, name="new")
        assert trained == ["client-1", "client-2", "client-3"]
        assert (history["reason"] == "").all() and not adopted_models(tmp_path / "runs/new")
    assert read_parameters({"profile": "demo"}).name == before


def test_the_code_that_trains_is_hashed_and_that_which_reads_results_is_not(tmp_path, monkeypatch):
    copy = tmp_path / "fedutils"
    shutil.copytree(provenance.PACKAGE, copy)
    for room in (provenance, files):
        monkeypatch.setattr(room, "PACKAGE", copy)

    def hashed():
        provenance.code_hash.cache_clear()
        return provenance.code_hash()

    before = hashed()
    for wing, other in {
        "client.py": True, "base/scores.py": True, "training/batchnorm.py": True,
        "privacy/gradients.py": True, "films/partition.py": True, "network/hospital.py": True,
        "films/phantom/cases.toml": True, "batch/report.html.j2": False,
        "evidence/words.py": False, "plots/style.py": False, "batch/run.py": False,
    }.items():  # fmt: skip
        text = (copy / wing).read_text()
        (copy / wing).write_text(text + "\n# changed\n")
        assert (hashed() != before) == other, wing
        (copy / wing).write_text(text)
    provenance.code_hash.cache_clear()


def test_weights_are_known_by_their_content_and_the_dtype_as_resolved(tmp_path, monkeypatch):
    file = tmp_path / "resnet34-mine.pth"
    names = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        names.append(read_parameters({"profile": "demo", "weights": str(file)}).name)
    assert names[0] != names[1]
    about = {"profile": "demo", "weights": "none"}
    kept = read_parameters(about).name
    monkeypatch.setattr(provenance, "precision", lambda *_: torch.bfloat16)
    assert read_parameters(about).name != kept
    official = provenance.weights_hash(None)
    assert official == "b627a593"  # the digits in the name of torchvision's file


def test_min_clients_belongs_to_a_run_where_it_decides_who_is_drawn(tmp_path):
    def identity_of(**changes):
        return tiny_settings(tmp_path, **changes).identity()

    assert identity_of(min_clients=2) == identity_of(min_clients=3)
    some = {"client_fraction": 0.3}
    assert identity_of(min_clients=2, **some) != identity_of(min_clients=3, **some)


def test_each_start_that_trains_is_written_down_and_looking_is_not_one(tmp_path):
    train(tmp_path)
    train(tmp_path, rounds=2)
    Training(tiny_settings(tmp_path, rounds=2), tiny_films(tmp_path)).train()  # nothing is left
    starts = config(tmp_path)["starts"]
    assert len(starts) == 2
    for start in starts:
        assert {"at", "fedutils", "torch", "device", "machine", "git_revision"} <= start.keys()
    assert {"code", "torch", "dtype", "weights_sha256"} <= config(tmp_path).keys()


def test_an_own_strategy_is_known_by_its_code(tmp_path):
    class Own(FedAvg):
        pass

    first = identity.name_class(Own)
    assert first.startswith("Own ") and identity.name_class(FedAvg) == "FedAvg"
    train(tmp_path, Own)
    assert config(tmp_path)["server"] == identity.name_class(Own)


def test_a_run_whose_models_are_all_adopted_has_its_history_and_says_whose_they_are(tmp_path):
    first = train(tmp_path, name="first", arms="federated,centralised", seeds="0,1")
    second = train(tmp_path, name="second")
    written = read_history(tmp_path / "runs/second")
    assert len(written) == len(second) == 4 and (tmp_path / "runs/second/clients.csv").is_file()
    assert second["state_sha256"].iloc[-1] in set(first["state_sha256"])
    assert adopted_models(tmp_path / "runs/second") == {"federated-s0": "first"}
    (start,) = config(tmp_path, "second")["starts"]
    assert start == {"run": "first"} | config(tmp_path, "first")["starts"][0]


def test_where_nothing_is_left_to_train_no_model_is_built(tmp_path, monkeypatch):
    train(tmp_path, name="first")
    monkeypatch.setattr(replicas, "start_model", lambda *about: pytest.fail("built"))
    train(tmp_path, name="first")


def test_an_adopted_model_that_trains_on_is_named_all_the_same(tmp_path):
    train(tmp_path, name="first")
    history = train(tmp_path, name="more", rounds=3)
    assert history["reason"].iloc[-1] == ""
    assert adopted_models(tmp_path / "runs/more") == {"federated-s0": "first"}
    assert len(config(tmp_path, "more")["starts"]) == 2


def test_other_threads_make_another_model(tmp_path):
    train(tmp_path, name="one", threads=1)
    assert (train(tmp_path, name="two", threads=2)["reason"] == "").all()
    assert (train(tmp_path, name="open", threads=0)["reason"] == "adopted from run one").all()


OWN = """
from fedutils.fedavg import FedAvg
HALF = {half}
class Base(FedAvg):
    def step(self, state, mean, server, share):
        return super().step(state, {{k: HALF * v for k, v in mean.items()}}, server, share)
class Mine(Base):
    pass
"""


@pytest.mark.parametrize("from_a_file", [True, False])
def test_an_own_strategy_is_another_where_what_it_uses_is(tmp_path, monkeypatch, from_a_file):
    """In a file, and typed in a notebook, of which no source can be had."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    for number, half in enumerate((0.5, 0.0, 0.5)):
        if from_a_file:
            (tmp_path / "ours.py").write_text(OWN.format(half=half))
            sys.modules.pop("ours", None)
            importlib.invalidate_caches()
            names.append(checkpoint_name("ours"))
        else:
            scope = {"__name__": f"cell{number}"}
            exec(OWN.format(half=half), scope)
            names.append(identity.name_class(scope["Mine"]))
    assert names[0] == names[2] != names[1] and names[0].startswith("Mine ")


def checkpoint_name(module):
    return identity.name_class(importlib.import_module(module).Mine)
