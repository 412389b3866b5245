"""The model card says what the run's files say, on any data, and phantom on the phantom."""

import json

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_films, tiny_settings

from fedutils.evidence.card import write_card
from fedutils.evidence.explain import POINTING
from fedutils.films.phantom.cases import FINDINGS
from fedutils.films.read import DRAWN, OWN

PARTS = {"train": {"films": 36, "patients": 36}, "test": {"films": 1012, "patients": 12}}
REPORT = {"release": "2017", "lists": ["train_val", "test"], "films": 60, "patients": 60,
          "splits": PARTS, "fingerprint": "f00d", "outputs": [*FINDINGS], "source": "NIH ChestX-ray14, release 2017",
          "labels_by": "Labels were mined from reports by text."}  # fmt: skip


def said(texts):
    """What a report says of its source and its labels."""
    return dict(zip(("source", "labels_by"), texts, strict=True))


START = {"fedutils": "9", "git_revision": "0123456789abcdef", "torch": "2.9", "device": "CPU"}
START |= {"machine": "x86"}


def evaluated(work, arms=("federated", "local"), report=REPORT, **changes):
    """A run folder as notebooks 03 and 04 leave it, with made-up figures; Hernia undefined."""
    settings = tiny_settings(work, **changes)
    films = tiny_films(work)
    (settings.prepared / "report.json").write_text(json.dumps(report))
    folder = settings.run / "evaluation"
    folder.mkdir(parents=True)
    (settings.run / "config.json").write_text(
        json.dumps({"threads": 1, "starts": [START], "server": "FedAvg"})
    )
    films.index[["patient_id", "client"]].to_csv(settings.run / "clients.csv", index=False)
    owners = [(arm, 0, "client-2" if arm == "local" else "") for arm in arms]
    rounds = [(*o, r, 0.7 - 0.1 * r, 0.5) for o in owners for r in (1, 2)]
    columns = ["arm", "seed", "client", "round", "val_auroc", "val_loss"]
    rows = pd.DataFrame(rounds, columns=columns).assign(reason="")
    rows.loc[rows["arm"] == "local", "reason"] = "adopted from run other"
    rows.to_csv(settings.run / "history.csv", index=False)
    findings = pd.DataFrame({"finding": [*FINDINGS, "mean"], "positives": 13})
    one = findings.assign(metric="auroc", test_set="all", value=0.7, ci_low=0.6, ci_high=0.8)
    one.loc[one["finding"] == "Hernia", ["value", "ci_low", "ci_high"]] = np.nan
    two = findings.assign(hospital="", prevalence=0.1, brier=0.08, ece=0.02, slope=0.9)
    two["intercept"] = np.nan
    for name, table in (("metrics", one), ("calibration", two)):
        tables = [table.assign(arm=a, seed=s, client=c) for a, s, c in owners]
        pd.concat(tables).to_csv(folder / f"{name}.csv", index=False)
    pd.DataFrame(columns=POINTING).to_csv(folder / "pointing.csv", index=False)
    return settings


def test_the_card_says_what_the_run_was_and_what_it_reached(tmp_path):
    settings = evaluated(tmp_path)
    text = write_card(settings)
    assert (settings.run / "MODEL_CARD.md").read_text() == text
    for said in (
        "NIH ChestX-ray14, release 2017: 60 films", "`f00d`", "test 1,012 films of 12 patients",
        "3 clients, partition iid", "`global_model.safetensors`, of round 1;", "2 rounds",
        "| federated | – | 0 | 0.700 (0.600 to 0.800) | 13 |", "| local | client-2 | 0 | 0.700",
        "| Hernia | 0.100 | not defined | 0.080 | 0.020 | 0.900 | – |",
        "fedutils 9 (0123456789ab), torch 2.9, on CPU (x86)", "adopted from run other",
        "not measurable at this size", "mined from reports by text", "updates can leak", "Diagnosis",
    ):  # fmt: skip
        assert said in text, said
    assert "hantom" not in text and "BatchNorm is local" not in text and "nan" not in text


def test_on_the_phantom_the_card_says_phantom(tmp_path):
    text = write_card(evaluated(tmp_path, report=REPORT | {"release": "phantom"} | said(DRAWN)))
    assert "Trained on phantom films" in text and "nothing here is evidence about patients" in text
    assert "NIH" not in text and "mined" not in text and "Any use on real films" in text


def test_the_card_of_own_films_does_not_speak_of_nih(tmp_path):
    text = write_card(evaluated(tmp_path, report=REPORT | {"release": "own"} | said(OWN)))
    assert "Films and table of the user's own" in text and "as it was given" in text
    assert "NIH" not in text and "mined" not in text and "hantom" not in text


def test_without_a_federated_arm_the_card_says_that_no_model_leaves(tmp_path):
    settings = evaluated(tmp_path, arms=("local",), report=REPORT | {"lists": []},
                         batchnorm="local")  # fmt: skip
    text = write_card(settings)
    assert "no global model leaves" in text and "load_state_dict" not in text
    assert "By finding, of local, seed 0, client-2" in text and "a hash of the patient" in text
    assert "BatchNorm is local" in text


def test_the_mean_over_seeds_stands_for_the_seeds(tmp_path):
    settings = evaluated(tmp_path, arms=("federated",))
    path = settings.run / "evaluation/metrics.csv"
    table = pd.read_csv(path)
    pd.concat([table, table.assign(seed=np.nan, value=0.65)]).to_csv(path, index=False)
    text = write_card(settings)
    assert "| federated | – | mean over seeds | 0.650 (0.600 to 0.800) | 13 |" in text
    assert "| federated | – | 0 |" not in text and text.count("| Mass |") == 1


def test_a_missing_table_is_named(tmp_path):
    settings = evaluated(tmp_path)
    (settings.run / "evaluation/pointing.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"pointing\.csv"):
        write_card(settings)
