"""One of five hospitals lies: what each aggregation makes of it, under each BatchNorm policy."""

import shutil
from unittest import mock

import pytest
from tiny import tiny_films, tiny_settings

from fedutils.client import Client
from fedutils.dataset import ChestXrayDataset, read_index
from fedutils.films.partition import partition_patients
from fedutils.settings import read_parameters
from fedutils.training import batchnorm
from fedutils.training.training import Training

RULES = ("mean", "median", "trimmed")
POLICIES = ("average", "precise", "frozen", "local")
# What the liar sends: the global state plus so many times its step, and in running means 100 more.
WEIGHTS = {"honest": 1, "flipped": -1, "scaled": 10, "flipped and scaled": -10}
BUFFERS, MEASURED, WORST = "buffers", "measured", "flipped and scaled"
SHIFT = 100.0  # what a lie adds to each running mean
# Where a lie can be told: measured statistics are the policy `precise`, averaged ones `average`.
TOLD = {
    "average": ("honest", WORST, BUFFERS), "precise": ("honest", WORST, BUFFERS, MEASURED),
    "frozen": ("honest", WORST, BUFFERS), "local": ("honest", WORST, BUFFERS),
}  # fmt: skip


class Liar(Client):
    """A hospital that trains as all do, and then sends something else."""

    lie = "honest"

    def fit(self, model, sent, kept, round):
        update, kept = super().fit(model, sent, kept, round)
        for name, value in update.state.items():
            if self.lie == BUFFERS:
                value += SHIFT if name.endswith("running_mean") else 0
            elif value.is_floating_point():
                factor = 1 if "running" in name else WEIGHTS.get(self.lie, 1)
                value.copy_(sent[name] + factor * (value - sent[name]))
        return update, kept


def measure_falsely(client, *about):
    """Measure as all do; the liar adds to each mean."""
    found = MEASURE(client, *about)
    for name, value in found.items():
        if getattr(client, "lie", "") == MEASURED and name.endswith("running_mean"):
            value += SHIFT
    return found


MEASURE = batchnorm.measure_batchnorm


def auroc_with_a_liar(settings, films, lie):
    """Train federatedly; return the validation AUROC of the aggregate after the last round."""

    class Deceived(Training):
        """Has the liar among its clients, also when they are planned anew with cached features."""

        def _plan(self, films):
            jobs = super()._plan(films)
            first = jobs[0].clients[0]
            jobs[0].clients[0] = liar = Liar(first.name, first.films, settings, first.seed)
            liar.lie = lie
            return jobs

    with mock.patch.object(batchnorm, "measure_batchnorm", measure_falsely):
        history = Deceived(settings, films).train()
    shutil.rmtree(settings.run)  # the next run would take over this one's model: settings are equal
    return history[history["client"] == ""]["val_auroc"].iloc[-1]


def measure(make_settings, films, lies=tuple(WEIGHTS)):
    """Return the AUROC by lie and rule."""
    return {
        lie: {
            rule: auroc_with_a_liar(
                make_settings(aggregation=rule, name=f"{rule}-{lie}".replace(" ", "-")), films, lie
            )
            for rule in RULES
        }
        for lie in lies
    }


def measure_policies(make_settings, films):
    """Return the AUROC by policy and lie, and by rule."""
    return {
        f"{policy}, {lie}": row
        for policy, lies in TOLD.items()
        for lie, row in measure(
            lambda policy=policy, **changes: make_settings(batchnorm=policy, **changes), films, lies
        ).items()
    }


def compare_rules(values):
    """Measure on the films that a run of these parameters has prepared; return the tables."""
    settings = read_parameters(values)
    index = read_index(settings.prepared)
    placed = partition_patients(index, "iid", settings.num_clients, settings.alpha, settings.seed)
    clients = placed.set_index("patient_id")["client"]
    films = index.assign(client=index["patient_id"].map(clients))
    dataset = ChestXrayDataset(settings.prepared, films)

    def changed(**changes):
        return read_parameters(values | changes)

    weights = table_text(measure(changed, dataset))
    return f"{weights}\n\n{table_text(measure_policies(changed, dataset))}"


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


@pytest.mark.slow
def test_robust_rules_hold_for_all_that_travels_under_each_policy(tmp_path, capsys):
    films = tiny_films(tmp_path, films=400, clients=5)

    def settings(**changes):
        values = {"rounds": 3, "tracked": "layer4,fc", "lr": 0.003, "num_clients": 5}
        return tiny_settings(tmp_path, **values | {"augment": "false"} | changes)

    table = measure_policies(settings, films)
    with capsys.disabled():
        print("", table_text(table), sep="\n")
    for name, row in table.items():
        honest = table[f"{name.partition(',')[0]}, honest"]
        for rule in ("median", "trimmed"):
            assert row[rule] > honest[rule] - 0.1, (name, rule)
