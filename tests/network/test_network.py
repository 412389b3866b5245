"""A real Flower network on 127.0.0.1, bounded in time: bits, keys, quiet, and honest failures."""

import contextlib
import dataclasses
import json
import sys
import threading
import time

import pandas as pd
import pytest
import torch
from flower import (
    Flower,
    compare_models,
    scatter,
)
from safetensors.torch import save_file
from tiny import tiny_films, tiny_homes, tiny_settings

from fedutils.__main__ import main
from fedutils.base.errors import InputError, NotebookFailed
from fedutils.films.partition import partition_patients
from fedutils.films.phantom.write import write_phantom
from fedutils.films.read import read_folder
from fedutils.films.split import split_patients
from fedutils.network import commands
from fedutils.network.commands import (
    check_flower,
    flower_environment,
    make_certificate,
    make_key,
    register,
    run_server_app,
    show,
    superlink,
)
from fedutils.training.training import Training


@pytest.fixture
def flwr():
    pytest.importorskip("flwr", reason="the extra `flower` is not installed: make flower-test")


def values(settings, work):
    return dataclasses.asdict(settings) | {"work_dir": work, "name": "run"}


def rows(work):
    path = work / "runs/run/history.csv"
    return (
        pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame({"round": []})
    )


def test_over_tls_the_run_is_the_simulation_and_an_unknown_node_is_refused(flwr, tmp_path):
    films, keys = tiny_films(tmp_path, clients=2), tmp_path / "keys"
    settings = tiny_settings(tmp_path, num_clients=2, rounds=1, batchnorm="average")
    expected = Training(settings, films).train()["state_sha256"].iloc[-1]
    homes = tiny_homes(tmp_path / "homes", films)
    make_certificate(keys, "127.0.0.1")
    for name in (*homes, "stranger"):
        make_key(keys, name)
    with Flower(tmp_path / "flower", keys) as flower:
        for name, home in homes.items():
            register(keys / f"{name}.key.pub", flower.environment)
            flower.join(name, home)
        flower.join("stranger", homes["client-1"])
        run_server_app(values(settings, tmp_path / "server"), flower.environment, 600, 300)
        processes = dict(flower.processes)
    assert rows(tmp_path / "server")["state_sha256"].iloc[-1] == expected
    assert "Failed to activate SuperNode" in (tmp_path / "flower/stranger.log").read_text()
    assert all(process.poll() is not None for process in processes.values())


@pytest.mark.slow
def test_killed_nodes_and_a_killed_server_cost_rounds_not_the_run(flwr, tmp_path):
    films = tiny_films(tmp_path, clients=2)
    settings = tiny_settings(tmp_path, num_clients=2, rounds=50)
    homes, work = tiny_homes(tmp_path / "homes", films), tmp_path / "server"

    def wait_for(seen):
        end = time.monotonic() + 400
        while not seen(rows(work)):
            assert time.monotonic() < end, rows(work)
            time.sleep(0.5)

    def start():
        how = values(settings, work), flower.environment, 900, 200
        threading.Thread(target=run, args=how, daemon=True).start()

    def run(*how):
        with contextlib.suppress(NotebookFailed):  # its server will be killed
            run_server_app(*how)

    def kill(name):
        flower.processes[name].kill()
        flower.stop(name)

    with Flower(tmp_path / "flower") as flower:
        for name, home in homes.items():
            flower.join(name, home)
        start()
        wait_for(lambda table: (table["round"] == 1).any())
        kill("client-2")
        wait_for(lambda table: len(table) and (table["status"] == "failed").any())
        flower.join("client-2", homes["client-2"])
        lost = rows(work).query("status == 'failed'")
        assert set(lost["client"]) == {"client-2"}
        wait_for(
            lambda table: table.query("client == 'client-2' and status == 'ok'")["round"].max() > 2
        )
        kill("superlink")
        before = int(rows(work)["round"].max())
        flower.start("superlink", superlink("127.0.0.1", flower.port, flower.folder, None))
        flower.wait_for_superlink(60)
        settings = tiny_settings(tmp_path, num_clients=2, rounds=before + 1)
        run_server_app(values(settings, work), flower.environment, 400, 200)
    models = rows(work).query("client == ''")["round"].tolist()
    assert models == list(range(1, before + 2))


def fake(tmp_path, run, status):
    """A `flwr` in place of Flower's, by PATH: its `run` says that and ends with 0; `list` a status."""
    listed = {"runs": [{"status": status, "status-details": "films of another size"}]}
    tool = tmp_path / "flwr"
    tool.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        f"print({json.dumps(listed)!r} if 'list' in sys.argv else {run!r}, flush=True)\n"
        "time.sleep(60 if 'slow' in sys.argv[-2] else 0)\n"
    )
    tool.chmod(0o755)
    return {"PATH": str(tmp_path)}


def test_a_failed_run_is_reported_as_failed_though_the_command_ends_well(tmp_path):
    there = fake(tmp_path, "Successfully started run 7", "finished:failed")
    with pytest.raises(NotebookFailed, match="run 7 finished:failed: films of another size"):
        run_server_app({}, there)
    there = fake(tmp_path, "no app here", "finished:completed")
    with pytest.raises(NotebookFailed, match="did not start the run: no app here"):
        run_server_app({}, there)
    there = fake(tmp_path, "Successfully started run 7", "finished:completed")
    assert run_server_app({}, there)["status"] == "finished:completed"


def test_a_command_that_hangs_is_stopped(capsys):
    began = time.monotonic()
    call = ["/bin/sh", "-c", "echo here; exec sleep 60"]
    assert show(call, {}, 3) == "here\n" and time.monotonic() - began < 60


def test_a_missing_or_other_flower_is_named(monkeypatch):
    monkeypatch.setattr(commands, "version", lambda name: "1.40.1")
    with pytest.raises(
        InputError, match=r"flwr 1.40.1 is installed, 1.42 is supported: pip install"
    ):
        check_flower()

    def missing(name):
        raise commands.PackageNotFoundError(name)

    monkeypatch.setattr(commands, "version", missing)
    with pytest.raises(
        InputError, match=r"Flower is not installed, the extra `flower`: pip install"
    ):
        check_flower()


def test_flower_is_quiet_and_installs_nothing(tmp_path):
    environment = flower_environment(tmp_path, "127.0.0.1:1", None)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert "--disable-runtime-dependency-installation" in superlink("127.0.0.1", 1, tmp_path, None)
    assert environment["FLWR_HOME"] == str(tmp_path)  # nothing in the user's own


def test_keys_are_private_and_never_overwritten(tmp_path):
    make_key(tmp_path, "a")
    make_certificate(tmp_path, "server.example.org")
    for name in ("a.key", "server.key"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match=r"a.key is there already"):
        make_key(tmp_path, "a")


def test_each_hospital_gets_its_own_patients_and_no_others(tmp_path):
    data = read_folder(write_phantom(tmp_path / "phantom", patients=60, size=64))
    table = data.table.assign(split=split_patients(data.table, 0))
    clients = partition_patients(table, "scanner", 3, 0.5, 0)
    homes = scatter(data, clients, tmp_path / "hospitals")
    own = {name: read_folder(home / "films") for name, home in homes.items()}
    assert sum(len(part.table) for part in own.values()) == len(data.table)
    for name, part in own.items():
        patients = set(clients[clients["client"] == name]["patient_id"])
        assert set(part.table["patient_id"]) == patients and part.release == "phantom"
        assert part.films_present == len(part.table)
        same = split_patients(part.table, 0).to_numpy()
        there = table.set_index("image_index")["split"]
        assert (there.loc[part.table["image_index"]].to_numpy() == same).all()


def test_all_rounds_are_compared_and_hashes_printed(tmp_path, capsys):
    def write(name, states, auroc=0.8, kept="2"):
        (tmp_path / name / "models").mkdir(parents=True)
        table = {"arm": "federated", "client": "", "state_sha256": states, "seconds": 1.5,
                 "val_auroc": auroc, "val_loss": 0.2}  # fmt: skip
        pd.DataFrame(table).to_csv(tmp_path / name / "history.csv", index=False)
        model = tmp_path / name / "models/federated-s0.safetensors"
        save_file({"w": torch.zeros(1)}, model, metadata={"round": kept})

    same = ["a" * 64, "b" * 64]
    write("simulation", same)
    write("flower", same)
    write("early", ["c" * 64, "b" * 64])
    write("judged", same, auroc=0.81)
    write("kept", same, kept="1")
    about = {"network-traffic": {"total-bytes": 3e6}}
    compare_models(tmp_path / "simulation", {"flower": about})
    printed = capsys.readouterr().out
    assert printed.count("b" * 64) == 2 and printed.endswith("identical\n")
    assert "flower: 3 MB over the wire, 2 MB a round" in printed
    for other in ("early", "judged", "kept"):
        with pytest.raises(NotebookFailed, match="differ"):
            compare_models(tmp_path / "simulation", {"flower": about, other: about})


def test_a_hospital_is_told_what_it_cannot_set(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(commands, "check_flower", lambda: None)
    monkeypatch.setattr(commands.os, "execvpe", lambda *call: started.append(call[1]))
    here = ["flower", "hospital", "north", "--work", str(tmp_path)]
    assert main([*here, "-p", "clip=2"]) == 2 and not started
    assert "clip: a hospital sets device, weights, min_clients, secure" in capsys.readouterr().err
    assert main([*here, "-p", "wieghts=a"]) == 2 and not started
    assert "did you mean weights?" in capsys.readouterr().err
    assert main([*here, "-p", "weights=copy of it.pth"]) == 2 and not started
    assert "weights=copy of it.pth: no such file" in capsys.readouterr().err
    for device in ("banana", "cuda:7"):
        assert main([*here, "-p", f"device={device}"]) == 2 and not started
        assert f"device='{device}'" in capsys.readouterr().err
    copy = tmp_path / "copy of it.pth"
    copy.touch()
    main([*here, "-p", f"weights={copy}"])
    assert f'weights="{copy}"' in started[0][-2]
    main([*here, "-p", "device=cpu,cpu"])
    assert 'device="cpu,cpu"' in started[1][-2]
    main([*here, "-p", f"work_dir={tmp_path / 'mine'}"])
    assert f'work_dir="{tmp_path / "mine"}"' in started[2][-2]
    masks = ["-p", "secure_aggregation=true", "-p", "min_clients=3"]
    for keys in ([], ["--keys", str(tmp_path)]):
        assert main([*here, *masks, *keys]) == 2 and len(started) == 3
        said = capsys.readouterr().err
        assert "wants --keys DIR" in said or "it has no NAME.key.pub" in said
    (tmp_path / "south.key.pub").touch()
    main([*here, *masks, "--keys", str(tmp_path)])
    assert 'secure_aggregation="True"' in " ".join(started[3]) and 'min_clients="3"' in " ".join(
        started[3]
    )
    for wrong in ("min_clients=few", "dp=none", "total_epsilon=-1"):
        assert main([*here, "-p", wrong]) == 2 and len(started) == 4
    main([*here, "-p", "dp=patient", "-p", "total_epsilon=8"])
    assert 'dp="patient"' in started[4][-2] and 'total_epsilon="8.0"' in started[4][-2]
    assert main(["flower", "server", "-p", "rounds=2"]) == 2  # no step but these has parameters
    assert "no option -p" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rouns=20", "did you mean rounds?"), ("partition=scanner", "over a network only partition"),
        ("arms=local", "over a network only arms"), ("compare=network", "only compare=''"),
        ("data_dir=.", "data_dir"), ("rounds=0.5", "rounds="), ("batchnorm=local", "batchnorm"),
    ],
)  # fmt: skip
def test_the_server_says_what_a_network_cannot_heed_before_anything_starts(
    flwr, tmp_path, monkeypatch, capsys, given, said
):
    monkeypatch.setattr(commands, "show", lambda *call: pytest.fail("Flower was started"))
    assert main(["flower", "train", "--work", str(tmp_path), "-p", given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_servers_own_films_are_refused_however_they_are_named(flwr, tmp_path, monkeypatch):
    from fedutils.network.server import read_network

    assert read_network({"work_dir": str(tmp_path)}).data_dir == ""
    monkeypatch.setenv("NIH_DATA_DIR", str(write_phantom(tmp_path / "films", patients=20)))
    with pytest.raises(InputError, match="NIH_DATA_DIR"):
        read_network({"work_dir": str(tmp_path)})
