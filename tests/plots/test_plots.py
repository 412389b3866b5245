"""Figures say what they must, on plausible and on degenerate tables, and nothing overlaps."""

import itertools

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedutils.base.findings import NO_FINDING, findings_of
from fedutils.evidence.explain import (
    ALL_BOXES,
    BY_MODEL,
    CENTRE,
    ELSEWHERE,
    KINDS,
    POINTING,
    UPPER,
)
from fedutils.films.mapping import presets
from fedutils.films.phantom.cases import FINDINGS
from fedutils.plots.films import (
    client_heatmap,
    cooccurrence,
    demographics,
    film_grid,
    films_per_patient,
    finding_grid,
    prevalence,
    split_overlap,
)
from fedutils.plots.scores import (
    auroc_forest,
    client_matrix,
    difference_forest,
    pr_curves,
    roc_curves,
    run_forest,
    subgroup_forest,
)
from fedutils.plots.style import GREY, save
from fedutils.plots.training import cost_curves, learning_curves
from fedutils.plots.trust import gallery, pointing, reliability_diagram


def film_table(n):
    """A tidy table of n films, three a patient, on two scanners."""
    rng = np.random.default_rng(n)
    table = pd.DataFrame(rng.random((n, 14)) < 0.15, columns=FINDINGS).astype(float)
    table["Hernia"] = 0.0
    table["patient_id"] = np.arange(n) // 3
    table["age"] = rng.integers(1, 95, n).astype(float)
    table["sex"] = rng.choice(["F", "M"], n)
    table["view"] = rng.choice(["AP", "PA"], n)
    table["scanner"] = rng.choice(["0.143", "0.168"], n)
    return table


def history(arms, seeds=1, rounds=5, clients=3):
    """Rows as the round loop writes them, nearly equal between arms, so that labels collide."""
    rows = []
    for arm, seed, r in itertools.product(arms, range(seeds), range(1, rounds + 1)):
        owners = [f"hospital-{k}" for k in range(clients)] if arm == "local" else [""]
        for k, client in enumerate(owners):
            values = [1 / (r + 1), 1 / r + 0.001 * seed, 0.7 - 0.2 / r + 0.001 * k]
            rows.append([arm, seed, r, client, *values])
    columns = ["arm", "seed", "round", "client", "train_loss", "val_loss", "val_auroc"]
    return pd.DataFrame(rows, columns=columns)


def metrics_table(arms, clients=("",), test_sets=("all",)):
    """Rows of metrics.csv for every finding and the mean, Hernia undefined."""
    rows = []
    for arm, client, name, finding in itertools.product(
        arms, clients, test_sets, ("mean", *FINDINGS)
    ):
        lost, few = finding == "Hernia", name == "sex=F"
        ci = [np.nan] * 3 if lost else [0.7, 0.65, 0.75]
        rows.append(
            [arm, "", client, name, finding, "auroc", *ci, 100, 0 if lost else 13 - 12 * few]
        )
    columns = "arm,seed,client,test_set,finding,metric,value,ci_low,ci_high,n,positives"
    return pd.DataFrame(rows, columns=columns.split(","))


EVERYWHERE = ("all", "h0", "h1", "sex=F", "sex=M", "view=AP", "one film a patient")


def three_arms():
    """Rows of metrics.csv for all arms, two local models, on every kind of test set."""
    local = metrics_table(["local"], ["", "h0", "h1"], EVERYWHERE)
    both = metrics_table(["federated", "centralised"], test_sets=EVERYWHERE)
    return pd.concat([both, local], ignore_index=True)


def difference_table(seconds):
    """Rows of differences.csv: Mass is shown, Hernia undefined, no other difference shown."""
    rows = []
    for second, finding in itertools.product(seconds, ("mean", *FINDINGS)):
        values = [0.03, 0.01, 0.05] if finding == "Mass" else [0.0, -0.02, 0.02]
        values = [np.nan] * 3 if finding == "Hernia" else values
        verdict = "shown" if finding == "Mass" else "no difference shown"
        rows.append(["federated", second, "all", finding, "auroc", *values, -0.01, 0.04, verdict])
    columns = "first,second,test_set,finding,metric,value,ci_low,ci_high,seed_low,seed_high,verdict"
    return pd.DataFrame(rows, columns=columns.split(","))


def cost_table(arms, rounds=3):
    """What each arm had spent at each round; only federated sends anything."""
    rows = [
        [arm, 0, r, 100 * r, 0.5 * r * (arm == "federated"), 0.7 - 0.1 / r]
        for arm, r in itertools.product(arms, range(1, rounds + 1))
    ]
    columns = ["arm", "seed", "round", "films_seen", "gigabytes", "val_auroc"]
    return pd.DataFrame(rows, columns=columns)


def calibration_table():
    """Rows of calibration.csv of one model; the last finding but one has few patients, the last none."""
    table = pd.DataFrame({"finding": FINDINGS, "ece": 0.02 + 0.01 * np.arange(14)})
    table["ece_low"], table["ece_high"] = table["ece"] - 0.01, table["ece"] + 0.02
    table.loc[12:, ["ece_low", "ece_high"]] = np.nan
    table.loc[13, "ece"] = np.nan
    return table


def pointing_table(arms, findings):
    """Rows of pointing.csv, every tally 3 of 984."""
    owners = [(BY_MODEL, arm) for arm in arms]
    owners += [(m, np.nan) for m in (CENTRE, ELSEWHERE, UPPER)]
    rows = [
        [method, arm, 0, "", finding, 3, 984, 3 / 984, 0.001, 0.009]
        for method, arm in owners
        for finding in (*findings, ALL_BOXES)
    ]
    return pd.DataFrame(rows, columns=POINTING)


def gallery_panels(findings):
    """Panels as `fill_gallery` returns them: with a heat map, without, and without film."""
    film, nothing = np.zeros((8, 8), np.uint8), {"probability": None, "film": None, "heat": None}
    shown = {"probability": 0.97, "film": film, "heat": np.eye(2), "boxes": [[1, 2, 3, 4]]}
    kinds = (shown, shown | {"probability": 0.001, "heat": None}, nothing | {"boxes": []})
    return [
        {"finding": finding, "kind": kind} | panel
        for finding in findings
        for kind, panel in zip(KINDS, kinds, strict=True)
    ]


def client_report(clients):
    shares = pd.DataFrame(0.1, index=[f"h{k}" for k in range(clients)], columns=FINDINGS)
    return shares.assign(films=[1000 * (k + 1) for k in range(clients)], patients=300)


def texts(figure):
    """Every text of a figure, line breaks as spaces."""
    found = figure.findobj(Text)
    return [text.get_text().replace("\n", " ") for text in found if text.get_text()]


def assert_apart(labels, figure):
    """No two labels overlap, and all lie within the figure."""
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in labels]  # without the thread to its line
    for (one, a), (other, b) in itertools.combinations(zip(labels, boxes, strict=True), 2):
        assert not a.overlaps(b), f"{one.get_text()!r} overlaps {other.get_text()!r}"
    for label, box in zip(labels, boxes, strict=True):
        inside = figure.bbox.padded(1)
        corners = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
        assert corners, f"{label.get_text()!r} leaves the figure"


def every_figure(films=30, clients=3, rounds=5):
    """All figures on a test set of one size."""
    table = film_table(films)
    truth = table[list(FINDINGS)].to_numpy()
    film = np.zeros((8, 8), dtype=np.uint8)
    overlap = pd.DataFrame({"split": ["rows", "patients"], "share": [0.8, 0.0]})
    return {
        "prevalence": prevalence(table, "phantom"),
        "cooccurrence": cooccurrence(table, "phantom"),
        "films_per_patient": films_per_patient(table, "phantom"),
        "demographics": demographics(table, "phantom"),
        "finding_grid": finding_grid(
            dict.fromkeys(FINDINGS) | {"Mass": film}, {"Mass": [(1, 1, 2, 3)]}, "phantom"
        ),
        "film_grid": film_grid([film], ["a film"], "phantom"),
        "split_overlap": split_overlap(overlap, "phantom"),
        "client_heatmap": client_heatmap(client_report(clients), "phantom"),
        "learning_curves": learning_curves(history(["federated"], 1, rounds), "phantom"),
        "roc_curves": roc_curves(table[[*FINDINGS]], table[[*FINDINGS]] * 0.5, "phantom"),
        "pr_curves": pr_curves(table[[*FINDINGS]], table[[*FINDINGS]] * 0.5, "phantom"),
        "auroc_forest": auroc_forest(metrics_table(["federated"]), title="phantom"),
        "subgroup_forest": subgroup_forest(three_arms(), "phantom"),
        "client_matrix": client_matrix(three_arms(), "phantom"),
        "difference_forest": difference_forest(difference_table(["centralised"]), "phantom"),
        "cost_curves": cost_curves(cost_table(["federated"], rounds), "phantom"),
        "run_forest": run_forest(three_arms().assign(run="iid"), "phantom"),
        "reliability_diagram": reliability_diagram(
            truth, truth * 0.5, calibration_table(), "phantom"
        ),
        "pointing": pointing(pointing_table(["federated"], FINDINGS[:clients]), "phantom"),
        "gallery": gallery(gallery_panels(FINDINGS[:clients]), "phantom"),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(30, 3, 5), (1, 1, 1)], ids=["usual", "one of each"])
def test_every_figure_is_named_wide_as_github_and_leaves_nothing_open(size):
    style = dict(matplotlib.rcParams)
    for name, figure in every_figure(*size).items():
        assert isinstance(figure, Figure), name
        assert figure.get_size_inches()[0] * figure.dpi == pytest.approx(880), name
        assert any(text.endswith("· phantom") for text in texts(figure)), name
        smallest = min(t.get_fontsize() for t in figure.findobj(Text))
        assert smallest >= 9, name
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == style


def test_what_a_notebook_shows_of_a_saved_figure_is_the_file(tmp_path):
    shown = save(prevalence(film_table(10)), tmp_path / "films.png")
    assert shown.data == (tmp_path / "films.png").read_bytes()
    assert PIL.Image.open(tmp_path / "films.png").width == 880


def test_prevalence_counts_each_finding_and_films_without_any():
    table = film_table(10)
    table[list(FINDINGS)] = 0.0
    table.loc[:2, "Mass"] = 1.0
    table.loc[8:, "Edema"] = np.nan
    said = texts(prevalence(table))
    assert (
        "3  (30.0 %)" in said
        and "5  (62.5 %)" in said  # of eight films: two may or may not show Edema
        and NO_FINDING in said
        and set(FINDINGS) <= set(said)
    )
    ticks = [label.get_text() for label in prevalence(table).axes[0].get_yticklabels()]
    assert ticks[:2] == [NO_FINDING, "Mass"]


def test_cooccurrence_is_conditional_on_the_row():
    table = film_table(8)
    table[list(FINDINGS)] = 0.0
    table.loc[:3, "Effusion"] = 1.0
    table.loc[:0, "Mass"] = 1.0
    cells = cooccurrence(table).axes[0].collections[0].get_array().reshape(14, 14)
    effusion, mass = FINDINGS.index("Effusion"), FINDINGS.index("Mass")
    assert cells[effusion, mass] == 0.25 and cells[mass, effusion] == 1
    assert cells.mask[effusion, effusion] and cells.mask[FINDINGS.index("Hernia")].all()
    assert "Effusion (4)" in texts(cooccurrence(table))


def test_films_per_patient_says_how_much_the_top_percent_hold():
    table = pd.DataFrame({"patient_id": np.r_[np.zeros(60), np.arange(1, 41)]})
    said = texts(films_per_patient(table, "phantom"))
    assert any("top 1 % of patients (1) hold 60 % of the films" in text for text in said)
    assert "40  (97.6 %)" in said and "60  (60.0 %)" in said


def test_demographics_counts_what_it_cannot_show():
    table = film_table(20).assign(scanner="0.143")
    table.loc[:4, "age"] = np.nan
    table["view"] = ["AP"] * 5 + ["PA"] * 15
    figure = demographics(table)
    assert len(figure.axes) == 3
    assert "films (not shown: 5)" in texts(figure) and "25 %" in texts(figure)


def test_a_finding_without_a_film_is_said_to_have_none():
    films = dict.fromkeys(FINDINGS) | {"Mass": np.zeros((9, 9), np.uint8)}
    figure = finding_grid(films, {"Mass": [(1, 2, 3, 4)]})
    assert texts(figure).count("no film") == 13
    (box,) = figure.axes[FINDINGS.index("Mass")].patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1, 2, 3, 4)


def test_client_rows_carry_films_and_the_unlabelled_stay_grey():
    report = client_report(2)
    report.loc["h1", "Hernia"] = np.nan
    figure = client_heatmap(report)
    assert "h1 2,000 films, 300 patients" in texts(figure)
    cells = figure.axes[0].collections[0].get_array().reshape(2, 14)
    assert cells.mask.sum() == 1 and cells.mask[1, 13] and cells[0, 0] == 0


def test_five_data_sets_and_long_names_fit_in_a_figure():
    title = "2020 + chexpert + vinbigdata + rsna + padchest data, source"
    table = film_table(40).rename(columns={"Atelectasis": "Enlarged Cardiomediastinum"})
    for figure in (prevalence(table, title), cooccurrence(table, title)):
        assert_apart([figure._suptitle], figure)
    truth = table[findings_of(table)]
    panels = roc_curves(truth, truth.fillna(0), title)
    assert_apart([panels._suptitle, *(ax.title for ax in panels.axes[:5])], panels)


def test_without_any_is_what_each_source_looked_for():
    """Two sources of ten films, each without the findings of the other."""
    table = pd.DataFrame({"image_index": range(20), "source": ["n"] * 10 + ["s"] * 10})
    table["Mass"] = [1.0] * 4 + [0.0] * 6 + [np.nan] * 10
    table["Edema"] = [np.nan] * 10 + [1.0] * 5 + [0.0] * 5
    assert any(text.startswith("11  (55.0 %)") for text in texts(prevalence(table)))


@pytest.mark.parametrize(
    ("arms", "seeds", "rounds"),
    [
        (["federated"], 1, 5),
        (["federated", "centralised", "local"], 1, 5),
        (["federated", "centralised", "local"], 3, 8),
        (["federated", "centralised", "local", "fedprox", "fedadam"], 2, 1),
    ],
)
def test_learning_curves_are_named_at_their_ends_without_overlap(arms, seeds, rounds):
    figure = learning_curves(history(arms, seeds, rounds), "phantom")
    for ax in figure.axes:
        labels = [text for text in ax.texts if text.get_text()]
        assert len(labels) == (2 if len(arms) == 1 and ax is figure.axes[0] else len(arms))
        low, high = ax.get_ylim()
        shown = [t for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
        assert_apart([*labels, *shown], figure)
        ticks = [tick for tick in ax.get_xticks() if 1 <= tick <= rounds]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_learning_curves_mark_the_best_round_of_the_aggregated_model():
    rows = history(["federated"], rounds=6)
    rows["val_auroc"] = [0.5, 0.6, 0.75, 0.7, 0.7, 0.7]
    of_a_client = rows.assign(client="hospital-0", val_auroc=0.99, train_loss=99.0)
    figure = learning_curves(pd.concat([rows.assign(client=np.nan), of_a_client]))
    assert "federated best 0.750, round 3" in texts(figure)
    assert figure.axes[0].get_ylim()[1] < 2


def test_local_models_are_thin_and_their_mean_is_thick():
    figure = learning_curves(history(["federated", "local"], clients=4))
    thin = [line for line in figure.axes[1].lines if line.get_linewidth() < 1]
    assert len(thin) == 4
    assert any("thin: each seed or client" in text for text in texts(figure))


def test_learning_curves_without_any_auroc_say_so():
    rows = history(["federated"]).assign(val_auroc=np.nan)
    assert "not defined" in texts(learning_curves(rows))


@pytest.mark.parametrize("draw", [roc_curves, pr_curves])
def test_curves_have_a_panel_a_finding_and_name_the_undefined(draw):
    truth = np.zeros((20, 14))
    truth[:5, :12], truth[:, 12] = 1, 1
    truth[3, 0] = np.nan
    scores = np.linspace(1, 0, 20 * 14).reshape(20, 14)
    figure = draw(*(pd.DataFrame(part, columns=FINDINGS) for part in (truth, scores)))
    assert len([ax for ax in figure.axes if ax.get_title(loc="left")]) == 14
    assert texts(figure).count("no film shows it") == 1
    assert texts(figure).count("all films show it") == 1
    name = "AUROC" if draw is roc_curves else "AP"
    assert any(text.startswith(f"Atelectasis {name} 1.00") for text in texts(figure))


def test_pr_panels_show_the_prevalence_as_chance():
    truth = np.zeros((20, 14))
    truth[:5] = 1
    scores = np.random.default_rng(0).random((20, 14))
    figure = pr_curves(*(pd.DataFrame(part, columns=FINDINGS) for part in (truth, scores)))
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.25, 0.25]
    assert "(chance 0.250)" in figure.axes[0].get_title(loc="left")


def test_a_lone_arms_forest_writes_every_value():
    said = texts(auroc_forest(metrics_table(["federated"])))
    assert said.count("0.700 [0.650, 0.750]") == 14
    assert said.count("no film shows it") == 1 and "mean of 13" in said


@pytest.mark.parametrize("arms", [["federated"], ["federated", "centralised", "local"]])
def test_forest_labels_stay_apart(arms):
    figure = auroc_forest(metrics_table(arms), presets()["nih"].section("yardsticks"), "phantom")
    assert_apart([*figure.axes[0].texts, *figure.axes[0].get_yticklabels()], figure)
    assert any("Wang 2017" in text for text in texts(figure))


def test_forest_shows_local_models_as_circles_and_prefers_the_mean_over_seeds():
    table = metrics_table(["federated"])
    seed = table.assign(seed="0", value=0.1)
    local = metrics_table(["local"], clients=["", "h0", "h1"])
    figure = auroc_forest(pd.concat([table, seed, local], ignore_index=True))
    assert {"federated 0.700 [0.650, 0.750]", "mean local 0.700 [0.650, 0.750]"} <= set(
        texts(figure)
    )
    circles = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert max(len(line.get_xdata()) for line in circles) == 2 * 15
    alone = pd.concat([seed, local], ignore_index=True)
    assert "federated 0.100 [0.650, 0.750]" in texts(auroc_forest(alone))


def test_a_tick_stands_where_the_same_findings_are_on_all_films():
    figure = subgroup_forest(three_arms().assign(on_all_films=0.42), "phantom")
    ticks = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert ticks and {line.get_xdata()[0] for line in ticks} == {0.42}


def test_subgroups_with_few_positives_are_grey():
    figure = subgroup_forest(three_arms(), "phantom")
    colours = {text.get_position()[1] // 1: text.get_color() for text in figure.axes[0].texts}
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [f"{n} (100 films)" for n in EVERYWHERE if not n.startswith("h")]
    grey = names.index("sex=F (100 films)")
    assert colours[grey] == GREY and GREY not in {*colours.values()} - {colours[grey]}


def test_matrix_has_a_row_a_model_and_frames_local_models_at_home():
    figure = client_matrix(three_arms(), "phantom")
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["federated", "centralised", "mean local model", "local h0", "local h1"]
    frames = [patch.get_xy() for patch in figure.axes[0].patches]
    assert frames == [(0, 3), (1, 4)]
    assert texts(figure).count("0.700 [0.650, 0.750]") == 10


@pytest.mark.parametrize("locals_", [0, 1, 8])
def test_differences_are_filled_only_where_shown_and_labels_stay_apart(locals_):
    seconds = ["centralised", "mean local model", *(f"local client-{k}" for k in range(locals_))]
    figure = difference_forest(difference_table(seconds), "phantom")
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    filled = [line for line in points if line.get_markerfacecolor() != "white"]
    assert len(filled) == 2 and all(line.get_xdata()[0] == 0.03 for line in filled)
    assert texts(figure).count("not defined") == 2
    one = difference_table(seconds).assign(verdict="one training seed: not judged")
    said = [text for text in texts(difference_forest(one, "phantom")) if "not judged" in text]
    assert len(said) == len(seconds)
    assert_apart([*figure.axes[0].texts, *figure.axes[0].get_yticklabels()], figure)


def test_differences_between_three_runs_name_both():
    table = difference_table(["scanner", "dirichlet"]).assign(first="iid")
    last = difference_table(["dirichlet"]).assign(first="scanner")
    figure = difference_forest(pd.concat([table, last], ignore_index=True), "phantom")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()][:3]
    assert labels == ["mean: iid − scanner", "mean: iid − dirichlet", "mean: scanner − dirichlet"]
    assert_apart([*figure.axes[0].texts, *figure.axes[0].get_yticklabels()], figure)


def test_an_arm_that_sends_nothing_is_a_line_in_the_left_panel():
    figure = cost_curves(cost_table(["federated", "centralised", "local"]), "phantom")
    left, right = figure.axes
    assert [line.get_linestyle() for line in left.lines] == ["-", ":", ":"]
    assert [line.get_linestyle() for line in right.lines] == ["-", "-", "-"]
    assert "centralised sends nothing" in texts(figure) and "mean local" in texts(figure)
    for ax in figure.axes:
        assert_apart(ax.texts, figure)


def test_runs_stand_below_each_other():
    table = pd.concat([three_arms().query("client == '' and test_set == 'all'").assign(run=r)
                       for r in ("iid", "scanner")])  # fmt: skip
    figure = run_forest(table)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["iid", "scanner"]
    assert texts(figure).count("mean local 0.700 [0.650, 0.750]") == 2


def test_reliability_shows_what_was_observed_and_the_interval_of_each_error():
    truth = np.tile([1, 1, 1, 0, 0.0], 14 * 8).reshape(40, 14)
    table = calibration_table()
    figure = reliability_diagram(truth, np.full((40, 14), 0.2), table)
    (_, seen), (ax,) = figure.axes[0].lines, figure.axes[1:]
    assert seen.get_xydata().ravel() == pytest.approx([0.2, np.nanmean(truth)])
    assert [line.get_xdata()[0] for line in ax.lines][:2] == [0.02, 0.03]
    assert ax.lines[12].get_markerfacecolor() == "white"  # too few patients for an interval
    assert texts(figure).count("no labels") == 1


@pytest.mark.parametrize("arms", [["federated"], ["federated", "centralised", "local"]])
def test_pointing_names_models_and_baselines_once_without_overlap(arms):
    figure = pointing(pointing_table(arms, FINDINGS[:8]), "phantom")
    said = texts(figure)
    for name in (*arms, CENTRE, ELSEWHERE):
        assert said.count(f"3 of 984  {name}") == 1
    assert said.count("3 of 984") == (len(arms) + 2) * 8
    assert_apart([*figure.axes[0].texts, *figure.axes[0].get_yticklabels()], figure)


def test_gallery_panels_stay_apart_and_say_kind_and_probability():
    figure = gallery(gallery_panels(FINDINGS), "phantom")
    said = texts(figure)
    assert said.count("true positive 0.97") == said.count("false positive <0.01") == 14
    assert said.count("false negative") == said.count("no film") == 14 and set(FINDINGS) <= set(
        said
    )
    assert_apart([ax.title for ax in figure.axes], figure)
    first, second, _ = figure.axes[:3]
    assert len(first.images) == 2 and len(second.images) == 1
    assert first.images[1].get_extent() == [-0.5, 7.5, 7.5, -0.5]  # the heat map covers the film
    (box,) = first.patches
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (1, 2, 3, 4)


def test_a_notebook_shows_a_figure_whatever_the_backend_of_matplotlib():
    from IPython.core.formatters import PNGFormatter

    figure = split_overlap(pd.DataFrame({"split": ["by film"], "share": [0.5]}))
    assert PNGFormatter()(figure).startswith(b"\x89PNG")  # no inline backend has told it how
