"""`make evidence`: federated against centralised and local-only training, with intervals.

On the phantom a trunk is first trained on public films (another phantom: other patients, no test
film), as ImageNet weights are elsewhere; then layer4 and fc are trained in every arm. On `nih64`,
where NIH_TEST_DATA names real films, all layers are trained from scratch. Each arm's learning rate
comes from the same search on validation films. The seeds were fixed before the first run; what
comes out is reported whatever it says. At last, models of one arm that differ by their seed alone
are compared in groups: how often is a difference shown that is none? Tables and figures go to
work/evidence/.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from fedutils import write_phantom
from fedutils.base.files import find_root
from fedutils.batch.run import run
from fedutils.batch.sweep import sweep
from fedutils.evidence.differences import draws_by_seed, join_rows, pair_rows
from fedutils.evidence.metrics import REPEATS, evaluate_parts
from fedutils.evidence.predict import predict_films
from fedutils.evidence.tables import (
    ALL_FILMS,
    MEAN,
    SHOWN,
    best_rounds,
    mean_auroc_rows,
    read_table,
)
from fedutils.run import read_films, read_history
from fedutils.settings import FIELDS, Settings

ARMS = FIELDS["arms"].metadata["parts"]
# The search has a seed of its own: with the trunk's, 0, its first head would fit the trunk already.
SEEDS, SEARCH_SEED = "11,12,13,14,15", "10"
NULL_SEEDS, GROUPINGS = range(21, 41), 400
PARTITIONS = ["iid", "dirichlet", "scanner"]
RATES = ["0.0003", "0.001", "0.003"]
ARM_NAMES = {"federated": "federated", "centralised": "centralised", "local": "mean local model"}
FIGURES = ("auroc", "differences", "hospitals", "compare")


def train_trunk(work: Path, values: dict[str, str]) -> str:
    """Train all layers on public phantom films; return the file of weights."""
    data = write_phantom(work / "public", seed=1)
    values = values | {"data_dir": str(data), "work_dir": str(work / "trunk"), "name": "trunk"}
    values |= {"arms": "centralised", "rounds": "8", "lr": "0.001"}
    return str(run(values, only="02,03").run / "models/centralised-s0.safetensors")


def search_rates(values: dict[str, str], rates: list[str]) -> pd.Series:
    """Search each arm's learning rate on validation films with one seed; return it by arm."""
    found = sweep(values | {"seeds": SEARCH_SEED}, {"lr": rates}, only="02,03")
    best = pd.concat(best_rounds(read_history(s.run)).assign(rate=s.lr) for s in found)
    means = best.groupby(["arm", "rate"])["val_auroc"].mean().unstack("rate")
    print(means.to_string(float_format="{:.3f}".format))
    return means.idxmax(axis=1).astype(str)


def choose_rates(values: dict[str, str]) -> dict[str, str]:
    """Choose the learning rates of all arms on the scanner split."""
    rates = search_rates(values | {"name": "rate", "partition": "scanner"}, RATES)
    return {"lr": rates["federated"]} | {
        f"lr_{arm}": rates[arm] for arm in ARMS if arm != "federated"
    }


def report(title: str, runs: list[Settings]) -> str:
    """Tabulate what the runs found: each arm's mean AUROC, and the differences that matter."""
    head = [*ARM_NAMES.values(), *(f"federated − {name}" for name in list(ARM_NAMES.values())[1:])]
    lines = [f"### {title}", "", "| partition | " + " | ".join(head) + " |", "|---" * 6 + "|"]
    for settings in runs:
        folder = settings.run / "evaluation"
        metrics, differences = (
            mean_auroc_rows(read_table(folder / f"{name}.csv"), test_set="all")
            for name in ("metrics", "differences")
        )
        metrics = metrics[(metrics["seed"] == "") & (metrics["client"] == "")].set_index("arm")
        differences = differences.set_index("second")
        cells = [cell(metrics.loc[arm], "") for arm in ARM_NAMES]
        cells += [cell(differences.loc[name], "+") for name in list(ARM_NAMES.values())[1:]]
        lines.append(f"| {settings.partition} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(row: pd.Series, sign: str) -> str:
    """Write a value with its interval and, of a difference, what is shown."""
    value, low, high = (f"{row[key]:{sign}.3f}" for key in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}] {row.get('verdict', '')}".strip()


def evidence(name: str, title: str, values: dict[str, str], root: Path) -> str:
    """Search rates, run all partitions, keep the figures; return the table."""
    values = values | {"work_dir": str(root / name), "arms": ",".join(ARMS), "num_clients": "3"}
    rates = choose_rates(values)
    runs = sweep(values | rates | {"name": name, "seeds": SEEDS}, {"partition": PARTITIONS})
    for settings in runs:
        for figure in FIGURES:
            path = settings.run / "evaluation" / f"{figure}.png"
            if path.is_file():
                shutil.copy(path, root / f"{name}-{settings.partition}-{figure}.png")
    return report(f"{title}; learning rates {rates}, seeds {SEEDS}", runs)


def null_rates(values: dict[str, str], root: Path) -> str:
    """Train one arm from scratch with many seeds; tabulate how often groups of them differ."""
    values = values | {"work_dir": str(root / "null"), "name": "null", "num_clients": "3"}
    values |= {
        "seeds": ",".join(map(str, NULL_SEEDS)),
        "image_size": "32",
        "rounds": "6",
        "lr": "0.001",
    }
    settings = run(values, only="02,03")
    films = read_films(settings)
    predictions = predict_films(settings, films, "test")
    index = films.index.set_index("image_index").loc[predictions["image_index"].unique()]
    groups = {"all": {ALL_FILMS: np.ones(len(index), dtype=bool)}}
    draws, metrics, enough, _ = evaluate_parts(predictions, index, groups, settings.seed, REPEATS)
    by_seed = draws_by_seed(draws, ALL_FILMS)
    means = mean_auroc_rows(metrics)
    means = means[means["seed"] != ""]["value"]
    lines = [
        f"### {len(means)} models of one arm, mean AUROC {means.min():.3f} to {means.max():.3f}",
        "", "| seeds a side | mean shown | any finding shown |", "|---" * 3 + "|",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5):
        shown = np.zeros((GROUPINGS, 2), dtype=bool)
        for number in range(GROUPINGS):
            chosen = rng.choice([seed for seed in by_seed if seed], 2 * count, replace=False)
            sides = [{seed: by_seed[seed] for seed in part} for part in np.split(chosen, 2)]
            sides = [side | {"": np.mean(list(side.values()), axis=0)} for side in sides]
            names = {"test_set": ALL_FILMS, "first": "federated", "second": "centralised"}
            rows = join_rows([pair_rows(*sides, enough[ALL_FILMS], names)])
            rows = rows[rows["metric"] == "auroc"].set_index("finding")["verdict"] == SHOWN
            shown[number] = rows[MEAN], rows.drop(MEAN).any()
        lines.append(f"| {count} | {shown[:, 0].mean():.1%} | {shown[:, 1].mean():.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything, resuming where it was; write work/evidence/evidence.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="auto", help="auto, or bf16 where the CPU has it")
    parser.add_argument("--threads", default="0", help="of a replica; 0: one")
    parser.add_argument("--only", choices=("phantom", "nih64", "null"), help="one part")
    options = parser.parse_args()
    root = find_root() / "work" / "evidence"
    common = {"profile": "demo", "precision": options.precision, "threads": options.threads}
    parts, only = [], options.only
    if only in (None, "phantom"):
        tuned = {"weights": train_trunk(root, common), "tracked": "layer4,fc", "rounds": "6"}
        tuned |= {"cache_features": "true", "augment": "false"}
        parts.append(evidence("phantom", "Phantom, layer4 and fc", common | tuned, root))
    real = os.environ.get("NIH_TEST_DATA")
    if real and only in (None, "nih64"):
        scratch = {"data_dir": str(Path(real).resolve() / "nih64"), "rounds": "8"}
        parts.append(evidence("nih64", "nih64, from scratch", common | scratch, root))
    if only in (None, "null"):
        parts.append(null_rates(common, root))
    file = root / f"{only or 'evidence'}.md"
    file.write_text("\n".join(parts))
    print(file.read_text())


if __name__ == "__main__":
    main()
