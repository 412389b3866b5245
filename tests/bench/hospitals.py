"""`make hospitals`: five data sets as downloaded, alone and as five hospitals of one federation.

`downloads.py` draws films in the exact layout of NIH, CheXpert, VinBigData, RSNA and PadChest: each is
recognised by its preset, and speaks of its own findings in its own words. Each folder goes alone through
the four notebooks, in small, with all layers tracked. Then all together are five hospitals
(`data_dir = "A;B;C;D;E"`, `partition=source`), federated and local, from scratch; and the same films are
trained by plain FedAvg, whose mean does not ask who looked for what. The table has a row a finding: who
looks for it, and the AUROC of the local models that do, at home and on all films that are labelled for
it, of plain FedAvg, and of the label-aware mean. Writes work/hospitals/table.md.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from downloads import DOWNLOADS, write_download
from label_aware import PlainFedAvg, predict

import fedutils
from fedutils.base.files import find_root
from fedutils.batch.run import run
from fedutils.evidence.bootstrap import variance
from fedutils.evidence.intervals import mean_auroc_interval
from fedutils.evidence.metrics import REPEATS, count_patients, evaluate_parts, test_groups
from fedutils.evidence.predict import read_predictions
from fedutils.evidence.tables import ALL_FILMS, LEAST_PATIENTS, truth_of
from fedutils.settings import Settings

SMALL = ("CheXpert-v1.0-small", "RSNA", "PadChest")  # findings of each alone, and shared ones
COLUMNS = (
    "finding",
    "looked for in",
    "local, at home",
    "local, all films",
    "plain FedAvg",
    "label-aware",
)
MEAN = "mean"


def main() -> None:
    """Draw, run alone and together, train plain FedAvg beside, and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", default="8")
    parser.add_argument("--size", default="32")
    parser.add_argument("--small", action="store_true", help="three hospitals, one round, no more")
    options = parser.parse_args()
    root = find_root() / "work" / "hospitals"
    if options.small:
        print(hospitals(root / "small", SMALL, "1", "32", patients=60, alone=()))
    else:
        print(hospitals(root, list(DOWNLOADS), options.rounds, options.size))


def hospitals(
    root: Path,
    names: Sequence[str],
    rounds: str,
    size: str,
    patients: int = 0,
    alone: Sequence[str] | None = None,
) -> str:
    """Run some downloads alone and together below a folder; return the table, also written there."""
    began = time.perf_counter()
    folders = {name: write_download(name, root / "data", patients) for name in names}
    common = {"profile": "demo", "seed": "0"}
    run_alone({n: folders[n] for n in (folders if alone is None else alone)}, root, common)
    values = common | {"data_dir": ";".join(map(str, folders.values())), "work_dir": str(root)}
    values |= {"partition": "source", "arms": "federated,local", "image_size": size}
    settings = run(values | {"rounds": rounds, "name": "five"})
    films = fedutils.read_films(settings)
    plain = fedutils.read_parameters(
        values | {"rounds": rounds, "name": "plain", "arms": "federated"}
    )
    clients = films.index[["patient_id", "client", "split"]].drop_duplicates()
    plain.run.mkdir(parents=True, exist_ok=True)
    clients.to_csv(plain.run / "clients.csv", index=False)
    fedutils.Training(plain, films, PlainFedAvg).train()
    trained = read_predictions(settings.run / "evaluation/predictions.csv.gz")
    predictions = pd.concat([trained, predict(plain, "plain")], ignore_index=True)
    text = tabulate(predictions, films, settings)
    count, owners = len(films), films.index["patient_id"].nunique()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    text += (
        f"\n{count:,} drawn films of {owners:,} patients, {size} px, {rounds} rounds, one seed; "
    )
    text += f"{time.perf_counter() - began:.0f} s, {sum(u.ru_utime + u.ru_stime for u in used):.0f} s of CPU\n"
    (root / "table.md").write_text(text)
    return text


def run_alone(folders: dict[str, Path], root: Path, common: dict[str, str]) -> None:
    """Run each folder through the four notebooks, two at a time: most of it is starting kernels."""
    tiny = common | {"image_size": "32", "rounds": "1", "num_clients": "2", "name": "alone"}
    values = [
        tiny | {"data_dir": str(folder), "work_dir": str(root / "alone" / name)}
        for name, folder in folders.items()
    ]
    if values:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            list(pool.map(run, values))


def tabulate(
    predictions: pd.DataFrame, films: fedutils.ChestXrayDataset, settings: Settings
) -> str:
    """Tabulate the AUROC of each finding, and the mean over those with patients enough."""
    index = films.index.set_index("image_index").loc[predictions["image_index"].unique()]
    groups = {kind: part for kind, part in test_groups(index).items() if kind in ("all", "client")}
    draws, metrics, _, judged = evaluate_parts(predictions, index, groups, settings.seed, REPEATS)
    rows = metrics[(metrics["metric"] == "auroc") & (metrics["seed"] == "")]
    rows = rows.set_index(["arm", "client", "test_set", "finding"])
    trained = films.index[films.index["split"] == "train"].groupby("client")[films.findings].count()
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for finding in [*films.findings, MEAN]:
        homes = trained.index[trained.get(finding, trained[judged].sum(axis=1)) > 0]
        at_home = "" if finding == MEAN else mean_at_home(draws, index, homes, finding)
        cells = [rows.loc[(arm, "", ALL_FILMS, finding)] for arm in ("local", "plain", "federated")]
        name = f"mean of {len(judged)}" if finding == MEAN else finding
        who = "" if finding == MEAN else ", ".join(homes) or "none"
        lines.append("| " + " | ".join([name, who, at_home, *map(cell, cells)]) + " |")
    return "\n".join(lines) + "\n"


def cell(row: pd.Series) -> str:
    """Write a value with its interval, the value alone with few patients, or nothing."""
    if np.isnan(row["value"]):
        return ""
    span = f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"{row['value']:.3f}" + span * (not np.isnan(row["ci_low"]))


def mean_at_home(draws: dict, index: pd.DataFrame, homes: Sequence[str], finding: str) -> str:
    """Average the local models, each on its own hospital's test films, where it can be judged."""
    k = [name for name in fedutils.findings_of(index)].index(finding)
    own = {home: draws["local", "", home][home][0, k] for home in homes}
    own = {home: values for home, values in own.items() if not np.isnan(values[0])}
    if not own:
        return ""
    counts = []
    for home in own:
        mine = index[index["client"] == home]
        counts.append(count_patients(truth_of(mine)[:, [k]], mine["patient_id"].to_numpy()))
    counts, values = np.min(counts, axis=(0, 2)), np.mean(list(own.values()), axis=0)
    low, high = mean_auroc_interval(values[0], float(variance(values)), int(counts[0]))
    few = min(counts) < LEAST_PATIENTS
    row = {"value": values[0], "ci_low": np.nan if few else low, "ci_high": np.nan if few else high}
    return cell(pd.Series(row))


if __name__ == "__main__":
    main()
