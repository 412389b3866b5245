"""What a finding loses that one hospital of five looked for: `python tests/bench/label_aware.py`.

On the phantom, from the trunk of `evidence.py`, `layer4` and `fc` of cached features. Three findings
are labelled in one hospital each, in training and validation films; all test labels stay. Beside the
label-aware mean stands plain FedAvg, in whose mean all hospitals count by films in every row, and both
are compared with five hospitals that labelled everything: three seeds, paired, with intervals over
patients and seeds. Writes work/label_aware/table.md.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from evidence import train_trunk

import fedutils
from fedutils.base.files import find_root, sha256
from fedutils.base.state import State
from fedutils.batch.run import run
from fedutils.evidence.differences import draws_by_seed, join_rows, pair_rows
from fedutils.evidence.metrics import REPEATS, evaluate_parts
from fedutils.evidence.tables import ALL_FILMS, rows_of, with_interval
from fedutils.fedavg import FedAvg, WeightedMean
from fedutils.settings import Settings

ALONE = {"Effusion": "client-1", "Mass": "client-2", "Cardiomegaly": "client-3"}
SEEDS = "11,12,13"


class PlainMean(WeightedMean):
    """The mean that does not ask who looked for what."""

    def add(self, state: State, share: int, known: Sequence[int] = ()) -> None:
        """Add a client's state with its share alone."""
        super().add(state, share)


class PlainFedAvg(FedAvg):
    """FedAvg as it is elsewhere."""

    def aggregator(self) -> WeightedMean:
        """Return the plain mean."""
        return PlainMean()


def with_gaps(full: Settings, work: Path) -> None:
    """Copy a run's prepared films to `work`, without the labels that nobody looked for there."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(full.prepared, work / "prepared")
    films = fedutils.read_films(full).index
    for finding, home in ALONE.items():
        films.loc[(films["client"] != home) & (films["split"] != "test"), finding] = np.nan
    index = films.drop(columns="client")
    index.to_csv(work / "prepared/index.csv", index=False)
    report = json.loads((work / "prepared/report.json").read_text())
    report["fingerprint"] = sha256(index.to_csv().encode())  # these are other data
    (work / "prepared/report.json").write_text(json.dumps(report))


def predict(settings: Settings, arm: str) -> pd.DataFrame:
    """Return the test predictions of a trained run, under the name of an arm."""
    films = fedutils.stored_features(settings, fedutils.read_films(settings))
    return fedutils.predict_films(settings, films, "test").assign(arm=arm)


def main() -> None:
    """Train the three, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", default="6")
    parser.add_argument("--size", default="64")
    parser.add_argument("--trunk", default="", help="weights from other films; empty: train them")
    options = parser.parse_args()
    root = find_root() / "work" / "label_aware"
    common = {"profile": "demo", "image_size": options.size}
    trunk = options.trunk or train_trunk(root.parent / "evidence", common)
    values = common | {"weights": trunk, "seeds": SEEDS}
    values |= {"tracked": "layer4,fc", "augment": "false", "cache_features": "true", "lr": "0.001"}
    values |= {"num_clients": "5", "rounds": options.rounds, "name": "five"}
    full = run(values | {"work_dir": str(root / "full")}, only="01,02,03")
    predictions = [predict(full, "full")]
    for arm, strategy in (("aware", None), ("plain", PlainFedAvg)):
        with_gaps(full, root / arm)
        settings = fedutils.read_parameters(values | {"work_dir": str(root / arm)})
        index = fedutils.read_index(settings.prepared)
        clients = fedutils.read_films(full).index.set_index("image_index")["client"]
        films = fedutils.ChestXrayDataset(
            settings.prepared, index.assign(client=index["image_index"].map(clients))
        )
        fedutils.Training(settings, films, strategy).train()
        predictions.append(predict(settings, arm))
    text = tabulate(pd.concat(predictions, ignore_index=True), fedutils.read_films(full).index)
    (root / "table.md").write_text(text)
    print(text)


def tabulate(predictions: pd.DataFrame, films: pd.DataFrame) -> str:
    """Tabulate AUROC by finding, and both means' differences from full labelling."""
    index = films.set_index("image_index").loc[predictions["image_index"].unique()]
    groups = {"all": {ALL_FILMS: np.ones(len(index), dtype=bool)}}
    draws, metrics, enough, _ = evaluate_parts(predictions, index, groups, 0, REPEATS)
    by_arm = {arm: draws_by_seed(draws, ALL_FILMS, arm) for arm in ("full", "aware", "plain")}
    names = [{"test_set": ALL_FILMS, "first": arm, "second": "full"} for arm in ("aware", "plain")]
    pairs = [pair_rows(by_arm[n["first"]], by_arm["full"], enough[ALL_FILMS], n) for n in names]
    differences = rows_of(join_rows(pairs), metric="auroc").set_index(["first", "finding"])
    metrics = rows_of(metrics, metric="auroc", seed="", client="").set_index(["arm", "finding"])
    lines = [
        "| finding | all label it | label-aware − all | plain FedAvg − all |",
        "|---" * 4 + "|",
    ]
    for finding in [*ALONE, "mean"]:
        gaps = [differences.loc[(arm, finding)] for arm in ("aware", "plain")]
        cells = [with_interval(gap, sign="+") + f", {gap['verdict']}" for gap in gaps]
        whole = f"{metrics.loc[('full', finding), 'value']:.3f}"
        lines.append(f"| {' | '.join([finding, whole, *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
