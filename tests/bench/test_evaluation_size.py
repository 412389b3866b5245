"""All that notebook 04 computes and draws, with 20 models on as many films as NIH's test set."""

import json
import subprocess
import sys

import pytest

# Invented predictions of 2 seeds of 10 models (8 hospitals) on 25,596 films of 2,797 patients.
# Prints seconds, CPU seconds and the peak memory in MB.
CHILD = """
import json, resource, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd
from fedutils.evidence.metrics import evaluate_models
from fedutils.evidence.predict import write_predictions
from fedutils.evidence.tables import tabulate
from fedutils.evidence.words import headline
from fedutils.plots.scores import (
    auroc_forest, client_matrix, difference_forest, pr_curves, roc_curves,
    subgroup_forest)
from fedutils.films.phantom.cases import FINDINGS

films, people, rng = 25_596, 2_797, np.random.default_rng(0)
rates = [.13, .04, .18, .24, .07, .06, .02, .10, .07, .04, .04, .02, .04, .003]
truth = (rng.random((films, 14)) < rates).astype(int)
patient = rng.permutation(np.r_[np.arange(people), rng.integers(0, people, films - people)])
index = pd.DataFrame(truth, columns=list(FINDINGS)).assign(
    image_index=[f"{k:08d}.png" for k in range(films)], patient_id=patient.astype(str),
    client=[f"client-{1 + k % 8}" for k in patient], sex=rng.choice(["F", "M"], films),
    view=rng.choice(["AP", "PA"], films), age=rng.integers(1, 95, films),
    scanner=rng.choice(["0.143", "0.168", "0.139", "0.171", "0.194"], films))
names = [("federated", ""), ("centralised", ""), *(("local", f"client-{k}") for k in range(1, 9))]
tables = []
for seed in (0, 1):
    for arm, client in names:
        chance = 1 / (1 + np.exp(-rng.normal(size=truth.shape) - truth))
        table = pd.DataFrame(chance, columns=list(FINDINGS))
        about = {"arm": arm, "seed": seed, "client": client, "image_index": index["image_index"]}
        for name in reversed(about):
            table.insert(0, name, about[name])
        tables.append(table)
began, busy = time.perf_counter(), time.process_time()
marks = {}
def mark(name):
    marks[name] = round(time.process_time() - busy)
folder = Path(sys.argv[1])
path = folder / "predictions.csv.gz"
read = write_predictions(pd.concat(tables, ignore_index=True), path)
mark("written and read")
result = evaluate_models(read, SimpleNamespace(index=index), seed=0)
mark("evaluated")
assert headline(result, "invented", "")
tabulate(result.metrics)
for draw in (auroc_forest, subgroup_forest, client_matrix):
    draw(result.metrics, title="invented").savefig(folder / "figure.png")
difference_forest(result.differences, "invented").savefig(folder / "figure.png")
first = read[(read["arm"] == "federated") & (read["seed"] == 0)][list(FINDINGS)].to_numpy()
for draw in (roc_curves, pr_curves):
    draw(truth, first, "invented").savefig(folder / "figure.png")
mark("drawn")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": time.perf_counter() - began, "megabytes": peak,
                  "cpu": time.process_time() - busy, "cpu seconds until": marks}))
"""


@pytest.mark.slow
def test_twenty_models_on_a_test_set_like_nihs_take_under_ten_minutes(tmp_path, capsys):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n20 models, 25,596 films: {took}")
    assert took["seconds"] < 600
    assert took["megabytes"] < 4000
