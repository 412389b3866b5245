"""One of five hospitals lies: what mean, median and trimmed mean make of it.

`python tests/bench/test_robustness.py WORK KEY=VALUE ...` measures on the films that
`python -m fedutils run --work WORK --only 01,02` has prepared, and prints a table.
"""

import shutil
import sys

import pytest
from tiny import tiny_films, tiny_settings

from fedutils.client import Client
from fedutils.federation import Training
from fedutils.images import ChestXrayDataset, read_index
from fedutils.partition import partition_patients
from fedutils.settings import read_parameters

RULES = ("mean", "median", "trimmed")
# What the liar makes of its own step: it sends the global state plus so many times the step.
LIES = {"honest": 1, "flipped": -1, "scaled": 10, "flipped and scaled": -10}


class Liar(Client):
    """A hospital that trains as all do, and then sends another update."""

    factor = 1.0

    def fit(self, model, sent, kept, round):
        update, kept = super().fit(model, sent, kept, round)
        for name, value in update.state.items():
            value.copy_(sent[name] + self.factor * (value - sent[name]))
        return update, kept


def auroc_with_a_liar(settings, films, factor):
    """Train federatedly; return the validation AUROC of the aggregate after the last round."""
    training = Training(settings, films)
    first = training.jobs[0].clients[0]
    liar = Liar(first.name, first.films, settings, first.seed)
    liar.factor = factor
    training.jobs[0].clients[0] = liar
    auroc = training.train()["val_auroc"].iloc[-1]
    shutil.rmtree(settings.run)  # the next run would take over this one's model: settings are equal
    return auroc


def measure(make_settings, films, lies=tuple(LIES)):
    """Return the AUROC by lie and rule."""
    return {
        lie: {
            rule: auroc_with_a_liar(
                make_settings(aggregation=rule, name=f"{rule}-{LIES[lie]}"), films, LIES[lie]
            )
            for rule in RULES
        }
        for lie in lies
    }


def print_table(table):
    print("| the liar | " + " | ".join(RULES) + " |\n|---|" + "---|" * len(RULES))
    for lie, row in table.items():
        print(f"| {lie} | " + " | ".join(f"{row[rule]:.3f}" for rule in RULES) + " |")


@pytest.mark.slow
def test_median_and_trimmed_mean_withstand_a_liar_that_ruins_the_mean(tmp_path, capsys):
    films = tiny_films(tmp_path, films=600, clients=5)

    def settings(**changes):
        values = {"rounds": 8, "batchnorm": "frozen", "tracked": "fc", "lr": 0.03}
        values |= {"num_clients": 5, "augment": "false"}
        return tiny_settings(tmp_path, **values | changes)

    table = measure(settings, films)
    with capsys.disabled():
        print()
        print_table(table)
    bad = table["flipped and scaled"]
    assert min(bad["median"], bad["trimmed"]) > bad["mean"] + 0.05
    assert min(table["honest"].values()) > 0.6


if __name__ == "__main__":
    work, *pairs = sys.argv[1:]
    given = {"work_dir": work, "num_clients": 5, "batchnorm": "frozen"}
    given |= dict(pair.split("=", 1) for pair in pairs)
    prepared = read_parameters(given).prepared
    index = read_index(prepared)
    clients = partition_patients(index, "iid", 5, 0.5, 0).set_index("patient_id")["client"]
    dataset = ChestXrayDataset(prepared, index.assign(client=index["patient_id"].map(clients)))
    print_table(measure(lambda **changes: read_parameters(given | changes), dataset))
