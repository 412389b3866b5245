"""One of five hospitals lies: what mean, median and trimmed mean make of it."""

import shutil

import pytest
from tiny import tiny_films, tiny_settings

from fedutils.client import Client
from fedutils.dataset import ChestXrayDataset, read_index
from fedutils.films.partition import partition_patients
from fedutils.settings import read_parameters
from fedutils.training.training import Training

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

    class Deceived(Training):
        """Has the liar among its clients, also when they are planned anew with cached features."""

        def _plan(self, films):
            jobs = super()._plan(films)
            first = jobs[0].clients[0]
            jobs[0].clients[0] = liar = Liar(first.name, first.films, settings, first.seed)
            liar.factor = factor
            return jobs

    auroc = Deceived(settings, films).train()["val_auroc"].iloc[-1]
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


def compare_rules(values):
    """Measure on the films that a run of these parameters has prepared; return the table."""
    settings = read_parameters(values)
    index = read_index(settings.prepared)
    placed = partition_patients(index, "iid", settings.num_clients, settings.alpha, settings.seed)
    clients = placed.set_index("patient_id")["client"]
    films = index.assign(client=index["patient_id"].map(clients))
    dataset = ChestXrayDataset(settings.prepared, films)
    return table_text(measure(lambda **changes: read_parameters(values | changes), dataset))


def table_text(table):
    lines = ["| the liar | " + " | ".join(RULES) + " |", "|---|" + "---|" * len(RULES)]
    for lie, row in table.items():
        lines.append(f"| {lie} | " + " | ".join(f"{row[rule]:.3f}" for rule in RULES) + " |")
    return "\n".join(lines)


@pytest.mark.slow
def test_median_and_trimmed_mean_withstand_a_liar_that_ruins_the_mean(tmp_path, capsys):
    films = tiny_films(tmp_path, films=600, clients=5)

    def settings(**changes):
        values = {"rounds": 8, "batchnorm": "frozen", "tracked": "fc", "lr": 0.03}
        values |= {"num_clients": 5, "augment": "false"}
        return tiny_settings(tmp_path, **values | changes)

    table = measure(settings, films)
    with capsys.disabled():
        print("", table_text(table), sep="\n")
    bad = table["flipped and scaled"]
    assert min(bad["median"], bad["trimmed"]) > bad["mean"] + 0.05
    assert min(table["honest"].values()) > 0.6
