"""What privacy costs, read from the files of evaluated runs."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from trade import plot_trade, privacy_trade, trade_words

from fedutils.base.errors import InputError
from fedutils.settings import Settings


def write_run(work, name, auroc, epsilon, tracked="fc"):
    """The files that an evaluated run of two seeds leaves."""
    run = work / "runs" / name
    (run / "evaluation").mkdir(parents=True)
    (run / "models").mkdir()
    private = epsilon < math.inf
    config = Settings().identity()
    config |= {"tracked": tracked, "dp": "patient" if private else "off"}
    (run / "config.json").write_text(json.dumps(config))
    rows = [
        {"seed": seed, "value": auroc + shift}
        for seed, shift in (("", 0), ("0", -0.01), ("1", 0.01))
    ]
    same = {
        "arm": "federated",
        "client": "",
        "test_set": "all",
        "finding": "mean",
        "metric": "auroc",
    }
    table = pd.DataFrame(rows).assign(
        ci_low=auroc - 0.03, ci_high=auroc + 0.03, n=9, positives=3, **same
    )
    other = table.assign(test_set="client-1", value=0.99)
    pd.concat([other, table]).to_csv(run / "evaluation/metrics.csv", index=False)
    save_file({"fc.weight": torch.zeros(4, 6), "fc.bias": torch.zeros(1), "layer4.bn1.weight": torch.zeros(99)},
              run / "models/federated-s0.safetensors")  # fmt: skip
    if private:
        about = {
            "arm": "federated",
            "seed": 0,
            "client": "",
            "sampling_rate": 0.1,
            "noise_multiplier": 2.0,
        }
        hospitals = [
            {"hospital": "a", "patients": 50, "epsilon": epsilon, "total_epsilon": 2 * epsilon},
            {"hospital": "b", "patients": 90, "epsilon": epsilon / 2, "total_epsilon": epsilon},
        ]
        pd.DataFrame(hospitals).assign(**about).to_csv(run / "privacy.csv", index=False)


@pytest.fixture
def work(tmp_path):
    write_run(tmp_path, "fc-1", 0.55, 1.0)
    write_run(tmp_path, "fc-8", 0.65, 8.0)
    write_run(tmp_path, "fc", 0.75, math.inf)
    write_run(tmp_path, "layer4-1", 0.51, 1.0, "layer4,fc")
    write_run(tmp_path, "layer4", 0.7, math.inf, "layer4,fc")
    return tmp_path


def test_a_row_is_the_mean_over_seeds_on_all_test_films_at_the_worst_hospitals_epsilon(work):
    table = privacy_trade(work)
    assert table["run"].tolist() == ["fc-1", "fc-8", "fc", "layer4-1", "layer4"]
    assert table["epsilon"].tolist() == [1.0, 8.0, math.inf, 1.0, math.inf]
    first = table.iloc[0]
    assert (first["value"], first["lowest"], first["highest"], first["seeds"]) == (
        0.55,
        0.54,
        0.56,
        2,
    )
    assert first["patients"] == 50
    assert first["wanted"] == pytest.approx(2.0 * math.sqrt(25) / 0.1)  # BatchNorm is not trained


def test_words_say_where_the_gradient_drowns_and_how_many_patients_it_would_take(work):
    fc, layer4, _ = trade_words(privacy_trade(work))
    assert (
        "0.550 (0.520 to 0.580) at epsilon 1, 0.650 (0.620 to 0.680) at epsilon 8; 0.750 without"
        in fc
    )
    assert "drowns" not in fc
    assert "Up to epsilon 1 it is not told from guessing" in layer4 and "about 100" in layer4


def test_noise_is_not_blamed_where_nothing_was_learned_without_it(tmp_path):
    write_run(tmp_path, "fc-1", 0.5, 1.0)
    write_run(tmp_path, "fc", 0.5, math.inf)
    text, _ = trade_words(privacy_trade(tmp_path))
    assert "not told from guessing; that it would be without noise is not shown" in text


def test_words_and_figure_say_what_all_models_cost_together(work):
    """A run without privacy learned from the same patients: then there is no bound."""
    table = privacy_trade(work)
    assert "together, by its ledger: no bound (epsilon is infinite)." in trade_words(table)[-1]
    private = table[np.isfinite(table["epsilon"])]
    said = "ll models of this work folder together, by its ledger: epsilon 16.00"
    assert f"A{said}." in trade_words(private)
    assert f"a{said}" in plot_trade(private).axes[0].get_xlabel()


def test_runs_without_privacy_alone_are_refused(tmp_path):
    write_run(tmp_path, "fc", 0.75, math.inf)
    with pytest.raises(InputError, match="no evaluated run with dp=patient"):
        privacy_trade(tmp_path)


def test_the_figure_names_each_line_and_the_run_without_privacy(work):
    axes = plot_trade(privacy_trade(work)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "8", "no privacy"]
    assert {"fc", "layer4,fc", "guessing"} <= {text.get_text() for text in axes.texts}
