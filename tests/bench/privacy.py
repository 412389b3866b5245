"""`make privacy`: what differential privacy costs, and what a lying client does, on the phantom.

The trunk comes from public films, as in `evidence.py`; the runs see the phantom's own patients. The
learning rate of each choice of tracked layers is searched on validation films with a seed of its own, apart
for training with privacy (at epsilon 4) and without; the search itself is not accounted for. Table,
figure and sentences go to work/privacy/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the tests share

from evidence import SEEDS, search_rates, train_trunk
from test_robustness import compare_rules

from fedutils import plots
from fedutils.pipeline import run, sweep
from fedutils.settings import find_root
from fedutils.trade import privacy_trade, trade_words

EPSILONS = ["1", "2", "4", "8"]
RATES = {"fc": ["0.05", "0.2", "1"], "layer4,fc": ["0.05", "0.2", "1"]}
ROUNDS = {"fc": "6", "layer4,fc": "3"}  # a patient's gradient of layer4 takes 13 million numbers


def trade(values: dict[str, str], tracked: str) -> None:
    """Train with and without privacy, each at the learning rate that validation chose."""
    stem = tracked.split(",")[0]
    values = values | {"tracked": tracked, "rounds": ROUNDS[tracked]}
    private = values | {"dp": "patient"}
    trial = private | {"name": f"rate-{stem}-private", "target_epsilon": "4"}
    chosen = {"name": stem, "seeds": SEEDS, "lr": search_rates(trial, RATES[tracked])["federated"]}
    sweep(private | chosen, {"target_epsilon": EPSILONS})
    rate = search_rates(values | {"name": f"rate-{stem}"}, RATES[tracked])["federated"]
    run(values | {"name": f"{stem}-open", "seeds": SEEDS, "lr": rate})


def main() -> None:
    """Run everything, resuming where it was; write work/privacy/trade.csv and trade.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="auto", help="auto, or bf16 where the CPU has it")
    parser.add_argument("--threads", default="0", help="of a run; 0: all cores")
    parser.add_argument("--only", choices=[*RATES, "liars"], help="one part, without the summary")
    options = parser.parse_args()
    work = find_root() / "work"
    common = {"profile": "demo", "threads": options.threads, "precision": options.precision}
    values = common | {"work_dir": str(work / "privacy"), "batchnorm": "frozen"}
    values |= {"weights": train_trunk(work / "evidence", common), "augment": "false"}
    values |= {"cache_features": "true"}
    for tracked in RATES:
        if options.only in (None, tracked):
            trade(values | {"optimizer": "sgd"}, tracked)
    if options.only in (None, "liars"):
        run(values | {"name": "films"}, only="01,02")
        print(compare_rules(values | {"tracked": "layer4,fc", "num_clients": "5", "rounds": "3"}))
    if options.only is None:
        table = privacy_trade(work / "privacy")
        table.to_csv(work / "privacy" / "trade.csv", index=False)
        plots.privacy_trade(table).savefig(work / "privacy" / "trade.png")
        print("\n".join(trade_words(table)))


if __name__ == "__main__":
    main()
