"""What README shows is what runs."""

import re
from pathlib import Path

from tiny import tiny_films, tiny_settings

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_in_readme_runs(tmp_path, capsys):
    films, settings = tiny_films(tmp_path), tiny_settings(tmp_path, rounds=1)
    settings.run.mkdir(parents=True)
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    clients.to_csv(settings.run / "clients.csv", index=False)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space = {"settings": settings}
    exec(example, space)
    assert "60 " in capsys.readouterr().out
    assert len(space["history"]) == 4


def test_every_room_is_named_and_every_link_leads_somewhere():
    root = Path(__file__).parents[1]
    rooms = {path.stem for path in (root / "fedutils").glob("*.py")} - {"__init__", "__main__"}
    rooms |= {path.parent.name for path in (root / "fedutils").glob("*/__init__.py")}
    assert {"fedavg", "films", "training"} <= rooms
    assert not [room for room in rooms if f"`{room}`" not in README]
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert len(links) > 5 and not [link for link in links if not (root / link).exists()]
    assert README.count("\n") < 200
