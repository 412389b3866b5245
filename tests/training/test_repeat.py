"""The same seed gives the same bits in another process."""

import subprocess
import sys
from pathlib import Path

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny import tiny_films, tiny_settings
from fedutils.training.training import Training
work = Path(sys.argv[2])
history = Training(tiny_settings(work, device=sys.argv[3]), tiny_films(work)).train()
print(" ".join(history["state_sha256"].dropna()))
"""


def test_three_processes_and_two_devices_give_the_same_hashes_in_every_round(tmp_path):
    tests, hashes = str(Path(__file__).parents[1]), set()
    for number, device in enumerate(["cpu:0", "cpu", "cpu,cpu"]):
        command = [sys.executable, "-c", CHILD, tests, str(tmp_path / str(number)), device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        hashes.add(done.stdout)
    assert len(hashes) == 1 and len(hashes.pop().split()) == 2
