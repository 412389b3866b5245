"""Training that is killed again and again ends with the bits of the undisturbed run."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_films, tiny_settings

from fedutils.training.training import Training

TESTS = Path(__file__).parents[1]
# The process that trains. Each write to disk announces itself and takes a while, so that a good
# part of the kills lands inside of one.
CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import tiny_films, tiny_settings
from fedutils.training.training import Training
sync = os.fsync
def slow_sync(fd):
    print("writing", flush=True)
    time.sleep(0.03)
    sync(fd)
os.fsync = slow_sync
work = Path(sys.argv[2])
Training(tiny_settings(work, rounds=int(sys.argv[3])), tiny_films(work, films=30)).train()
"""


def until_killed(work, rounds, writes, delay):
    """Train until so many writes were begun, wait a moment, and kill; return the exit status."""
    command = [sys.executable, "-c", CHILD, str(TESTS), str(work), str(rounds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for count, _ in enumerate(child.stdout, start=1):
        if count == writes:
            time.sleep(delay)
            child.kill()
            break
    child.communicate()
    return child.returncode


def survive(tmp_path, kills):
    rng = np.random.default_rng(kills)
    rounds, work = 2 * kills, tmp_path / "killed"
    for _ in range(kills):
        # Half of the delays are shorter than a write, the others reach into training.
        delay = rng.uniform(0, 0.03) if rng.random() < 0.5 else rng.uniform(0, 0.5)
        assert until_killed(work, rounds, rng.integers(2, 7), delay) == -9, "no kill landed"
    settings = tiny_settings(work, rounds=rounds)
    history = Training(settings, tiny_films(work, films=30)).train()
    straight = tmp_path / "straight"
    expected = Training(
        tiny_settings(straight, rounds=rounds), tiny_films(straight, films=30)
    ).train()
    assert history.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    stored = pd.read_csv(settings.run / "history.csv", keep_default_na=False)
    assert not stored.duplicated(["arm", "seed", "round", "client"]).any()
    assert stored["round"].value_counts().to_dict() == dict.fromkeys(range(1, rounds + 1), 4)


def test_five_kills_at_random_moments_change_no_bit(tmp_path):
    survive(tmp_path, kills=5)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    survive(tmp_path, kills=20)
