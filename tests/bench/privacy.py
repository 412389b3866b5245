"""`make privacy`: what privacy costs, what a model tells of its patients, what a liar does.

All on the phantom, with a trunk from public films, as in `evidence.py`. The learning rate of each
choice of tracked layers is searched on validation films with a seed of its own, apart for every
epsilon and without privacy. The epsilon of the table is that of one model; what all of them and the
search cost together stands in the ledger and as `total_epsilon` in each run's privacy.csv, and is
infinite, since runs without privacy learn from the same patients. Table, figure and sentences go to
work/privacy/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the tests share

from evidence import ARMS, SEEDS, search_rates, train_trunk
from test_robustness import compare_rules
from trade import plot_trade, privacy_trade, trade_words

from fedutils import membership_words, write_phantom
from fedutils.base.files import find_root
from fedutils.batch.run import run
from fedutils.evidence.tables import read_table

EPSILONS = ["1", "2", "4", "8"]
RATES = {"fc": ["0.05", "0.2", "1"], "layer4,fc": ["0.05", "0.2", "1"]}
ROUNDS = {"fc": "6", "layer4,fc": "3"}  # a patient's gradient of layer4 takes 13 million numbers


def private_values(values: dict[str, str], tracked: str, epsilon: str) -> dict[str, str]:
    """Return the values of private training, at the learning rate that validation chose."""
    private = values | {"tracked": tracked, "rounds": ROUNDS[tracked], "dp": "patient"}
    private |= {"optimizer": "sgd", "target_epsilon": epsilon}
    trial = private | {"name": f"rate-{stem(tracked)}-{epsilon}"}
    return private | {"lr": search_rates(trial, RATES[tracked])["federated"]}


def trade(values: dict[str, str], tracked: str) -> None:
    """Train with and without privacy, each at the learning rate that validation chose."""
    for epsilon in EPSILONS:
        chosen = {"name": f"{stem(tracked)}-{epsilon}", "seeds": SEEDS}
        run(private_values(values, tracked, epsilon) | chosen)
    free = values | {"tracked": tracked, "rounds": ROUNDS[tracked], "optimizer": "sgd"}
    rate = search_rates(free | {"name": f"rate-{stem(tracked)}"}, RATES[tracked])["federated"]
    run(free | {"name": f"{stem(tracked)}-open", "seeds": SEEDS, "lr": rate})


def stem(tracked: str) -> str:
    """Shorten a choice of tracked layers to part of a run's name."""
    return tracked.split(",")[0]


def attack(values: dict[str, str], folder: Path) -> None:
    """Ask of all arms, and of private models, who was trained on, with patients enough to tell."""
    many = {"data_dir": str(write_phantom(folder / "films", 4000, seed=2)), "seeds": "11"}
    many |= {"work_dir": str(folder)}
    open_run = {"name": "attack", "tracked": "layer4,fc", "arms": ",".join(ARMS), "rounds": "12"}
    runs = [values | many | open_run]
    for tracked in RATES:
        private = private_values(values, tracked, "4") | many
        runs.append(private | {"name": f"attack-private-{stem(tracked)}"})
    for chosen in runs:
        found = read_table(run(chosen).run / "evaluation" / "membership.csv")
        print(chosen["name"], *membership_words(found), sep="\n", flush=True)


def main() -> None:
    """Run everything, resuming where it was; write work/privacy/trade.csv and trade.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="auto", help="auto, or bf16 where the CPU has it")
    parser.add_argument("--threads", default="0", help="of a replica; 0: one")
    parser.add_argument(
        "--only", choices=[*RATES, "liars", "attack"], help="one part, without the summary"
    )
    options = parser.parse_args()
    work = find_root() / "work"
    common = {"profile": "demo", "threads": options.threads, "precision": options.precision}
    values = common | {"work_dir": str(work / "privacy"), "batchnorm": "frozen", "num_clients": "3"}
    values |= {"weights": train_trunk(work / "evidence", common), "augment": "false"}
    values |= {"cache_features": "true"}
    for tracked in RATES:
        if options.only in (None, tracked):
            trade(values, tracked)
    if options.only in (None, "liars"):
        run({key: values[key] for key in ("profile", "work_dir")}, only="01,02")
        about = {"tracked": "layer4,fc", "num_clients": "5", "rounds": "3", "lr": "0.001"}
        print(compare_rules(values | about))
    if options.only in (None, "attack"):
        attack(values, work / "membership")
    if options.only is None:
        table = privacy_trade(work / "privacy")
        table.to_csv(work / "privacy" / "trade.csv", index=False)
        plot_trade(table).savefig(work / "privacy" / "trade.png")
        print("\n".join(trade_words(table)))


if __name__ == "__main__":
    main()
