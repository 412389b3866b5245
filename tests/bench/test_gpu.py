"""The measurements for a GPU run without one, in small; their figures mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).with_name("gpu.py")


def measure(out, *more):
    """Run the measurements on the CPU; return what the file holds."""
    call = [sys.executable, GPU, "--device", "cpu", "--small", "--out", out, *more]
    subprocess.run(call, check=True, capture_output=True)
    return json.loads(out.read_text())


def test_each_part_writes_what_it_measured(tmp_path):
    said = measure(tmp_path / "gpu.json", "--only", "machine,speed")
    assert said["machine"]["matrix_fp32_tflops"] > 0
    row = said["speed"]["32 64 all"]
    assert row["of_bare"] == pytest.approx(row["films_s"] / row["bare_films_s"])
    assert said["session"]["32 64 all"]["minutes_a_round"] > 0


@pytest.mark.slow
def test_all_parts_run_without_a_gpu_and_what_must_be_equal_is(tmp_path):
    said = measure(tmp_path / "gpu.json")
    assert not [name for name, part in said.items() if "failed" in part]
    equal = ("twice", "two_replicas", "killed", "after_a_kill", "twice_local")
    assert all(said["repeats"][name] for name in equal)
    assert 0 < said["overflow"]["steps_counted"] < said["overflow"]["batches"]
    assert said["overflow"]["finite"] and not said["overflow"]["failed"]
