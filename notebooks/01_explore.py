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
# # 1 · Explore the films
#
# **What it does.** Reads the table, box list and split lists of a data set, checks them, and shows
# who is in the data: findings, patients, view positions, scanners.
#
# **Reads** the data folder (without one: a synthetic *phantom*, written in about 20 seconds).
# **Writes** `work/explore/checks.csv`. **Takes** seconds; no GPU.

# %% tags=["parameters"]
data_dir: str = ""  # a data set's folder as downloaded, or one with films.toml; empty: NIH_DATA_DIR, Kaggle, else the phantom
work_dir: str = ""  # where results go; empty: work/ beside the notebooks
profile: str = "auto"  # auto, demo (no GPU, no network) or kaggle: what an empty parameter means
seed: int = 0  # fixes the split of patients
findings: str = ""  # those to train, such as Effusion,Mass, in the data's order; empty: all the data know

# %% [markdown]
# The helper package `fedutils` lies beside the notebooks, is attached on Kaggle (in `../input`, at most
# three folders down), or is installed: the first of these that there is.

# %%
import glob, sys
sys.path[:0] = ["..", *(d for n in range(4) for d in glob.glob("../input/" + "*/" * n + "fedutils/.."))]
import fedutils

# %% [markdown]
# Which copy that was, and the versions:

# %%
fedutils.print_environment()

# %% [markdown]
# ## The data set as it is found
#
# A folder tells by its files which data set it is; films of your own come with a few lines that say
# what their table means (`data/README.md` shows both). All become one tidy table: a row a film.

# %%
settings = fedutils.read_parameters(globals())
data = fedutils.open_data(settings.data_dir, settings.work_dir, settings.findings)
table, title = data.table, f"{data.release} data"
summary = fedutils.summary(data)

# %% [markdown]
# What it holds, in a sentence that is computed from the table:

# %%
from IPython.display import HTML, Markdown

views = ", ".join(f"{count:,} {fedutils.plain(view)}" for view, count in summary["views"].items())
display(Markdown(
    f"**{summary['films']:,} films of {summary['patients']:,} patients** ({views or 'views unknown'}), label "
    f"release *{data.release}*, {len(data.boxes):,} boxes, split lists: {', '.join(data.lists) or 'none'}."
))
if data.release == "phantom":
    display(Markdown("These are **phantom** films: synthetic, and no evidence about patients."))

# %% [markdown]
# What this data set does not hold. A finding without labels is *unknown*, not absent: it is left out of
# the loss and of every metric.

# %%
display(Markdown(f"Not there: {', '.join(summary['missing']) or 'nothing; all is there'}."))

# %% [markdown]
# A few rows, to see the columns. Each finding has a column of its own: 1 present, 0 absent, NaN unknown.

# %%
table[["image_index", "patient_id", "age", "sex", "view", "scanner", *fedutils.findings_of(table)[:3]]].head()

# %% [markdown]
# ## Checks of the table and the file list
#
# A count of zero means that the check passed. Pixels are checked in notebook 02, which decodes each
# film once; 45 GB are not read twice.

# %%
from pathlib import Path

checks = fedutils.check_table(data)
folder = Path(settings.work_dir) / "explore"
folder.mkdir(parents=True, exist_ok=True)
checks.to_csv(folder / "checks.csv", index=False)
HTML(checks.to_html(index=False))

# %% [markdown]
# ## Who has what?
#
# Of several folders each is a *source*: a hospital with films, patients and a label language of its own.
# A grey cell is a finding that a source did not look for: there it is unknown, not absent.

# %%
sources = fedutils.compare_sources(table)
one = Markdown("There is one folder. `--data` may be given several times, also for other data sets.")
display(sources[["films", "patients", "age", "view"]] if len(sources) > 1 else one)

# %% [markdown]
# Films with each finding, source by source, where there are several:

# %%
if len(sources) > 1:
    display(fedutils.plots.client_heatmap(sources, title))

# %% [markdown]
# ## How common is each finding?
#
# A film may show several findings, so the bars do not add up to the number of films. *No Finding* is
# not a class to predict: it is all outputs near zero.

# %%
fedutils.plots.prevalence(table, title)

# %% [markdown]
# ## Which findings come together?
#
# Read a row: of all films with this finding, the share that also shows the finding of the column.
# Strong pairs mean that a model can be right about one finding by looking at the other.

# %%
fedutils.plots.cooccurrence(table, title)

# %% [markdown]
# ## How many films has a patient?
#
# Most patients have one film and a few have very many. Rows are therefore not independent: every
# interval in this project is computed over patients, not over films.

# %%
fedutils.plots.films_per_patient(table, title)

# %% [markdown]
# ## Who are the patients, and how were they examined?
#
# AP films are taken in bed, of sicker patients: the view position alone tells something about the
# findings. The scanner, told by its pixel spacing, is the most natural border between hospitals.

# %%
fedutils.plots.demographics(table, title)

# %% [markdown]
# ## What does each finding look like?
#
# One film for each finding, chosen by rule, not by eye: one with a box if there is one, then the
# fewest other findings, then the first name. Boxes mark the finding in the title.

# %%
films, boxes = fedutils.example_films(data)
fedutils.plots.finding_grid(films, boxes, title)

# %% [markdown]
# ## Why patients are split, and never films
#
# Many public notebooks shuffle the *films* into training and test. Then most test films have a
# sibling, the same patient on another day, in training, and the model is graded on faces that it
# knows. The share is computed here, on this very table.

# %%
leak = fedutils.leak_of_splits(table, settings.seed)
fedutils.plots.split_overlap(leak, title)

# %% [markdown]
# In words, with the numbers of this table:

# %%
shares = leak.set_index("split")["share"]
display(Markdown(
    f"Splitting films would leave **{shares['by film']:.0%}** of the held-out films with a patient who is"
    f" also in training. Splitting patients, as this project does, leaves **{shares['by patient']:.0%}**."
))

# %% [markdown]
# Next: `02_preprocess` decodes every film once and splits the patients.
