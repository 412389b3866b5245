"""A full disk is one line that says where and how much; and paths with a ~ lead home."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_settings

from fedutils.__main__ import main
from fedutils.base.errors import InputError
from fedutils.base.files import write_atomic
from fedutils.batch import run as batch
from fedutils.batch.trained import read_run
from fedutils.settings import read_parameters


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota"),
     SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_full_disk_is_named_with_what_is_free_and_leaves_no_half_file(tmp_path, error):
    def fail(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(InputError, match=r"model\.bin: the disk is full \([\d,]+ MB are free\)"):
        write_atomic(tmp_path / "model.bin", fail)
    assert not list(tmp_path.iterdir())


def test_any_other_error_stays_what_it_is(tmp_path):
    def fail(path):
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "model.bin", fail)


def test_the_command_says_it_in_one_line_when_a_notebook_cannot_be_saved(
    tmp_path, capsys, monkeypatch
):
    def fail(*about):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batch, "execute", fail)
    given = ["run", "--work", str(tmp_path), "--profile", "demo", "--only", "01"]
    assert main(given) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "01_explore.ipynb: the disk is full" in said[0]


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_parameters({"work_dir": "~/results", "profile": "demo"}).work_dir == str(
        tmp_path / "results"
    )
    settings = tiny_settings(tmp_path / "results")
    settings.run.mkdir(parents=True)
    (settings.run / "config.json").write_text(json.dumps(settings.identity()))
    assert read_run("~/results").work_dir == str(tmp_path / "results")
    torch.save({}, tmp_path / "resnet34-mine.pth")
    monkeypatch.chdir(tmp_path)
    for given in ("~/resnet34-mine.pth", "resnet34-mine.pth"):  # a notebook runs in another folder
        found = read_parameters({"weights": given, "profile": "demo"}).weights
        assert found == str(tmp_path / "resnet34-mine.pth")


def test_half_a_file_of_a_killed_process_goes_with_the_next_write(tmp_path):
    """Not one that lives, nor what another program calls alike."""
    dead, lives = tmp_path / f".model.bin.{(1 << 22) + 1}.tmp", tmp_path / ".model.bin.1.tmp"
    others = [lives, tmp_path / ".model.bin.tmp", tmp_path / ".model.bin.7z.tmp"]
    for path in (dead, *others):
        path.write_bytes(b"half")
    write_atomic(tmp_path / "model.bin", b"whole")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "model.bin"])
