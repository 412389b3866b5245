# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Evaluate on the test films
#
# **What it does.** Predicts the test films, once, with the model of the best validation round, and
# reports AUROC and average precision for all 14 findings with 95 % intervals over patients.
#
# **Reads** `work/prepared/` and `work/runs/NAME/`. **Writes** `work/runs/NAME/evaluation/`:
# `predictions.csv.gz`, `metrics.csv`, `differences.csv`, `summary.json` and the figures. **Takes**
# seconds for the demo, minutes for 20 models on all of NIH's test films.

# %% tags=["parameters"]
work_dir: str = ""  # where results are; empty: work/ beside the notebooks
name: str = ""  # of the run; empty: the latest
device: str = "auto"  # auto, cpu or cuda:0

# %% [markdown]
# The helper module `fedutils` lies beside the notebooks, is attached on Kaggle, or is installed. The
# first line of output says which versions ran.

# %%
import sys
from pathlib import Path

places = [Path.cwd(), *Path.cwd().parents, *Path("/kaggle/input").glob("*")]
sys.path[:0] = [str(place) for place in places if (place / "fedutils/__init__.py").is_file()][:1]

import fedutils
from IPython.display import HTML, Markdown, display

fedutils.print_environment()

# %% [markdown]
# ## The run, and its data
#
# The run says which data it was trained on. If notebook 02 has prepared other data since, this stops
# here and says so.

# %%
settings = fedutils.read_run(work_dir, name, device)
report = fedutils.read_report(settings.prepared)
fedutils.check_fingerprint(settings, report)
title = f"{report['release']} data, {settings.partition}"
display(Markdown(f"Run **{settings.name}**: {settings.arms}, seeds {settings.seeds}, {title}."))

# %% [markdown]
# The films with the hospital of their patient, as notebook 03 placed them:

# %%
films = fedutils.read_films(settings)
films.index.groupby(["client", "split"])["patient_id"].agg(films="size", patients="nunique").unstack()

# %% [markdown]
# ## Predict the test films
#
# Rounds and defaults are chosen on validation films; no choice has seen these. Metrics are computed
# from the file as it is written.

# %%
folder = settings.run / "evaluation"
predicted = fedutils.predict_films(settings, films, "test")
predictions = fedutils.write_predictions(predicted, folder / "predictions.csv.gz")
predictions.iloc[:3, :9]

# %% [markdown]
# ## In words
#
# Patients, not films, are drawn in the bootstrap, since films of a patient resemble one another, and the
# same 1,000 draws serve all models, so that differences are paired. Every sentence is computed from the
# tables below.

# %%
result = fedutils.evaluate_models(predictions, films, settings.seed)
summary = fedutils.write_summary(settings, result, title)
display(Markdown("\n".join(f"- {line}" for line in summary["headline"])))

# %% [markdown]
# The primary figure is the mean over one fixed set of findings, those with at least ten positive test
# patients. Labels alone decide, no model. Here they are:

# %%
display(Markdown(f"**{len(result.mean_over)} findings:** {', '.join(result.mean_over) or 'none'}."))

# %% [markdown]
# ## The table: every arm, every finding
#
# AUROC and average precision, as means over the training seeds, with 95 % intervals over patients. The
# *mean local model* is what a hospital gets on average if each trains alone.

# %%
HTML(fedutils.tabulate(result.metrics).to_html())

# %% [markdown]
# ## The same as a picture
#
# A point is the AUROC, the bar its 95 % interval over patients; 0.5 is guessing. Small circles are the
# models of single hospitals. Published figures appear only if these are NIH's own films with NIH's own
# test list: other splits do not compare.

# %%
official = report["lists"] == ["train_val", "test"] and report["release"] in ("2017", "2020")
yardsticks = fedutils.YARDSTICKS_OFFICIAL if official and report["films"] > 100_000 else None
figure = fedutils.plots.auroc_forest(result.metrics, yardsticks, title)
figure.savefig(folder / "auroc.png")
figure

# %% [markdown]
# Which of the two it is here:

# %%
note = "Published AUROCs of the official split are drawn in." if yardsticks else (
    "No published figure is drawn in: these are not all films of NIH's official split.")
display(Markdown(note))

# %% [markdown]
# ## ROC curves
#
# Sensitivity against the share of false alarms, one panel for each finding, of the first model of the
# run. The dotted diagonal is guessing.

# %%
test = films.where(films.index["split"] == "test")
first = predictions[["arm", "seed", "client"]].head(1)
scores = predictions.merge(first)[list(fedutils.FINDINGS)].to_numpy()
figure = fedutils.plots.roc_curves(test.labels, scores, title)
figure.savefig(folder / "roc.png")
figure

# %% [markdown]
# ## Precision-recall curves
#
# For rare findings these tell more: of the films that the model marks, how many are right? The dotted
# line is the prevalence, which is what guessing gives.

# %%
figure = fedutils.plots.pr_curves(test.labels, scores, title)
figure.savefig(folder / "precision_recall.png")
figure

# %% [markdown]
# ## Differences between the arms
#
# The federated model minus each other one, on the same draws of patients. A difference counts as *shown*
# when its interval excludes 0 and every training seed has its sign; for single findings its p, adjusted
# for 14 of them (Holm), must be below 0.05 as well. Otherwise no difference is shown, which does not say
# that there is none.

# %%
alone = f"Only one arm was trained ({settings.arms}): nothing to compare it with."
differences = fedutils.tabulate_differences_text(result.differences)
HTML(differences.to_html(index=False)) if len(differences) else Markdown(alone)

# %% [markdown]
# The same as a picture, by finding too. Filled points are shown differences, hollow ones are not; the
# short upright lines are the smallest and the largest value over the training seeds.

# %%
if len(result.differences):
    figure = fedutils.plots.difference_forest(result.differences, title)
    figure.savefig(folder / "differences.png")
    display(figure)

# %% [markdown]
# ## Fairness between hospitals
#
# Every model on every hospital's own test films, over the findings that all hospitals have enough of. A
# frame marks a local model at home: does federation give that hospital more than it had?

# %%
figure = fedutils.plots.client_matrix(result.metrics, title)
figure.savefig(folder / "hospitals.png")
figure

# %% [markdown]
# The hospital for which the first arm does least, and what its interval allows to say:

# %%
at_hospitals = fedutils.hospitals(result.metrics, settings.arm_list[0]).sort_values("value")
shown = ["arm", "test_set", "value", "ci_low", "ci_high", "n"]
HTML(at_hospitals[shown].to_html(index=False, float_format="{:.3f}".format))

# %% [markdown]
# ## Subgroups
#
# Mean AUROC by sex, age, view position and scanner, each family over the findings that all its groups
# have enough of. Grey groups hold under 30 positive labels: nothing is to be concluded from them. The
# last line takes one film a patient, the first, so that no patient counts more than another.

# %%
figure = fedutils.plots.subgroup_forest(result.metrics, title)
figure.savefig(folder / "subgroups.png")
figure

# %% [markdown]
# The first arm by subgroup and finding. A cell is grey where under 30 films are positive.

# %%
figure = fedutils.plots.subgroup_heatmap(result.metrics, title)
figure.savefig(folder / "subgroups_by_finding.png")
figure

# %% [markdown]
# ## What it cost
#
# The AUROC on validation films after each round, against the gigabytes that travelled until then and the
# films that were trained on. Only federation sends models; centralised training sends the films.

# %%
history = fedutils.read_history(settings)
cost = fedutils.training_cost(history, settings.local_epochs)
figure = fedutils.plots.cost_curves(cost, title)
figure.savefig(folder / "cost.png")
figure

# %% [markdown]
# What each arm had spent when it was best on validation, the mean over seeds:

# %%
known = cost.dropna(subset="val_auroc")
best = known.loc[known.groupby(["arm", "seed"], sort=False)["val_auroc"].idxmax()]
best = best.groupby("arm", sort=False)[["round", "films_seen", "gigabytes", "val_auroc"]].mean()
HTML(best.to_html(float_format="{:,.3f}".format))

# %% [markdown]
# ## What this is, and what it is not
#
# NIH's labels were mined from reports by text, not given by radiologists. Films stayed with their
# client, but updates can leak: federated is not yet private. Not for clinical use.

# %%
warning = "**Phantom films are synthetic: nothing here is evidence about patients.**"
display(Markdown(warning if report["release"] == "phantom" else "Labels were mined from reports by text."))

# %% [markdown]
# `summary.json` holds what it takes to repeat this run: parameters, versions, threads, device, the
# revision of the code, the fingerprint of the data, and hashes of models and predictions.
