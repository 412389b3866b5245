"""Round boundaries on disk: whole, verified, of this run; and one writer a run."""

import subprocess
import sys
import threading

import pytest
import torch

from fedutils.base.errors import InputError
from fedutils.base.files import run_lock
from fedutils.base.state import state_hash
from fedutils.rounds import Progress
from fedutils.training.checkpoint import Writer, load_progress, save_progress


def progress(round):
    return Progress(
        state={"w": torch.full((3,), float(round)), "n": torch.tensor(round)},
        server={"first/w": torch.rand(3).double()},
        clients={"scanner-0.143": {"variate/w": torch.rand(3)}, "empty": {}},
        round=round,
        best=[0.7, -0.2],
        best_round=1,
        rows=[{"round": 1, "train_loss": 1 / 3, "val_auroc": float("nan")}],
    )


def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path):
    saved = progress(1)
    save_progress(tmp_path, saved, "run")
    loaded = load_progress(tmp_path, "run")
    assert state_hash(loaded.state) == state_hash(saved.state)
    assert torch.equal(loaded.server["first/w"], saved.server["first/w"])
    assert loaded.clients.keys() == saved.clients.keys()
    name = "scanner-0.143"
    assert torch.equal(loaded.clients[name]["variate/w"], saved.clients[name]["variate/w"])
    assert loaded.rows[0]["train_loss"] == 1 / 3 and loaded.best == [0.7, -0.2]
    assert (loaded.round, loaded.best_round) == (1, 1)


def test_the_one_before_is_kept_and_older_ones_go(tmp_path):
    for round in (1, 2, 3):
        save_progress(tmp_path, progress(round), "run")
    assert [path.name[:11] for path in sorted(tmp_path.iterdir())] == ["round-00002", "round-00003"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "renamed"])
def test_a_damaged_checkpoint_is_recognised_and_the_earlier_one_used(tmp_path, damage):
    save_progress(tmp_path, progress(1), "run")
    last = save_progress(tmp_path, progress(2), "run")
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    damaged = {"truncated": content[:-9], "flipped": content, "empty": b""}
    damaged["renamed"] = last.read_bytes().replace(b"state|w", b"ttate|w")
    last.write_bytes(bytes(damaged[damage]))
    with pytest.warns(UserWarning, match=f"{last.name}.*checksum"):
        assert load_progress(tmp_path, "run").round == 1


def test_a_state_that_is_not_the_one_of_the_last_row_is_recognised(tmp_path):
    for round, noted in ((1, 1), (2, 1)):
        now = progress(round)
        now.rows[-1]["state_sha256"] = state_hash(progress(noted).state)
        save_progress(tmp_path, now, "run")
    with pytest.warns(UserWarning, match="round-00002.*checksum"):
        assert load_progress(tmp_path, "run").round == 1


def test_a_foreign_checkpoint_is_not_used(tmp_path):
    save_progress(tmp_path, progress(1), "run")
    save_progress(tmp_path, progress(2), "another run")
    with pytest.warns(UserWarning, match="another run"):
        assert load_progress(tmp_path, "run").round == 1


def test_a_full_disk_loses_nothing_already_there(tmp_path, monkeypatch):
    save_progress(tmp_path, progress(1), "run")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedutils.base.files.os.fsync", no_space)
    with pytest.raises(InputError, match="the disk is full"):
        save_progress(tmp_path, progress(2), "run")
    monkeypatch.undo()
    assert load_progress(tmp_path, "run").round == 1
    assert len(list(tmp_path.iterdir())) == 1, "the half-written file stayed"


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    save_progress(tmp_path, progress(1), "run")
    left = tmp_path / ".round-00002-0123456789abcdef.safetensors.77.tmp"
    left.write_bytes(b"half")
    assert load_progress(tmp_path, "run").round == 1 and left.exists()  # another may be writing it
    save_progress(tmp_path, progress(2), "run")
    assert load_progress(tmp_path, "run").round == 2 and not left.exists()


def test_hash_follows_names_dtypes_shapes_and_values():
    base = {"w": torch.arange(6).float()}
    others = [
        {"v": base["w"]},
        {"w": base["w"].double()},
        {"w": base["w"].reshape(2, 3)},
        {"w": base["w"] + 1},
    ]
    assert len({state_hash(state) for state in [base, *others]}) == 5
    channels_last = torch.rand(2, 3, 4, 4)
    again = channels_last.contiguous(memory_format=torch.channels_last)
    assert state_hash({"w": channels_last}) == state_hash({"w": again})


HOLD = """
import sys, time
from pathlib import Path
from fedutils.base.files import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_run_has_one_writer_and_a_dead_ones_lock_is_taken_over(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match=f"process {child.pid}"), run_lock(tmp_path):
        pass
    child.kill()
    child.communicate()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text() != str(child.pid)


def test_writes_happen_one_after_the_other_beside_the_work():
    writer, done, go = Writer(), [], threading.Event()
    writer.start(lambda: (go.wait(10), done.append(1)))
    assert not done  # the caller goes on while the first is still being written
    go.set()
    writer.start(lambda: done.append(2))
    writer.wait()
    assert done == [1, 2]


def test_what_goes_wrong_while_writing_is_raised_at_the_next_boundary():
    writer = Writer()

    def full():
        raise OSError("no space left")

    writer.start(full)
    with pytest.raises(OSError, match="no space"):
        writer.start(lambda: None)
    writer.wait()  # said once
