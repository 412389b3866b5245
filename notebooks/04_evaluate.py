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
# `predictions.csv.gz`, `metrics.csv`, `summary.json` and the figures. **Takes** seconds for the demo.

# %% tags=["parameters"]
work_dir: str = ""  # where results are; empty: work/ beside the notebooks
name: str = ""  # of the run; empty: the latest
device: str = "auto"  # auto, cpu or cuda:0
cache_features: bool = False  # read the trunk's output from notebook 03's store, where it is there
compare: str = ""  # names of other runs, such as A,B, to lay beside this one

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
settings = fedutils.read_run(work_dir, name, device, cache_features)
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
# ## AUROC and average precision
#
# Patients, not films, are drawn in the bootstrap, since films of a patient resemble one another. The
# mean is taken over the findings with at least ten positive test patients.

# %%
metrics = fedutils.evaluate_models(predictions, films, settings.seed)
summary = fedutils.write_summary(settings, metrics, title)
display(Markdown("\n".join(f"- {line}" for line in summary["headline"])))

# %% [markdown]
# The first model's figures by finding:

# %%
first = metrics.merge(metrics[["arm", "seed", "client"]].head(1))
HTML(fedutils.tabulate(first).to_html())

# %% [markdown]
# ## The same as a picture
#
# A point is the AUROC, the bar its 95 % interval over patients; 0.5 is guessing. Published figures
# appear only if these are NIH's own films with NIH's own test list: other splits do not compare.

# %%
official = report["lists"] == ["train_val", "test"] and report["release"] in ("2017", "2020")
yardsticks = fedutils.YARDSTICKS_OFFICIAL if official and report["films"] > 100_000 else None
figure = fedutils.plots.auroc_forest(metrics, yardsticks, title)
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
# Sensitivity against the share of false alarms, one panel for each finding. The dotted diagonal is
# guessing.

# %%
test = films.where(films.index["split"] == "test")
scores = predictions.merge(first[["arm", "seed", "client"]].head(1))[list(fedutils.FINDINGS)].to_numpy()
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
# ## What this is, and what it is not
#
# NIH's labels were mined from reports by text, not given by radiologists. Films stayed with their
# client, but updates can leak: federated is not yet private. Not for clinical use.

# %%
notes = {"phantom": "**Phantom films are synthetic: nothing here is evidence about patients.**",
         "own": "Labels are those of your own table; a finding that is not labelled was not trained either."}
display(Markdown(notes.get(report["release"], "Labels were mined from reports by text.")))

# %% [markdown]
# `summary.json` holds what it takes to repeat this run: parameters, versions, threads, device, the
# revision of the code, the fingerprint of the data, and hashes of models and predictions.
