"""What README shows is what runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tiny import tiny_films, tiny_settings

from fedutils.run import read_history
from fedutils.training.training import Training

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_in_readme_runs_word_for_word(tmp_path):
    """In a fresh process, where a demo has run before; nothing is put into it."""
    films = tiny_films(tmp_path / "work")
    settings = tiny_settings(tmp_path / "work", rounds=1, name="demo", tracked="all")
    Training(settings, films).train()
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    trained = films.index.query("split == 'train' and client == 'client-1'")
    assert done.stdout.startswith(f"{len(trained)} ") and "no film" in done.stdout
    assert len(read_history(tmp_path / "work/runs/cautious")) == 4


def test_every_room_is_named_and_every_link_leads_somewhere():
    root = Path(__file__).parents[1]
    rooms = {path.stem for path in (root / "fedutils").glob("*.py")} - {"__init__", "__main__"}
    rooms |= {path.parent.name for path in (root / "fedutils").glob("*/__init__.py")}
    assert {"fedavg", "films", "training"} <= rooms
    shown = re.search(r"```\nfedutils/.*?```", README, re.DOTALL)[0]
    assert not [room for room in rooms if f" {room}.py " not in shown and f" {room}/ " not in shown]
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 5 and not [link for link in links if not (root / link).exists()]
    assert README.count("\n") < 200
