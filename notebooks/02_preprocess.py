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
# # 2 · Preprocess the films
#
# **What it does.** Decodes every film *once* into one array of small grey images, checks the pixels
# on the way, and splits the patients into training, validation and test.
#
# **Reads** the data folder. **Writes** `work/prepared/`: `images.npy` (uint8), `index.csv` (a row a
# film), `boxes.csv`, `report.json` with the fingerprint. **Takes** about 10 ms a film and core for
# real 1024-pixel films, less for the phantom; no GPU. Killed at any moment, it goes on where it was.

# %% tags=["parameters"]
data_dir: str = ""  # a data set's folder as downloaded, or one with films.toml; empty: NIH_DATA_DIR, Kaggle, else the phantom
work_dir: str = ""  # where results go; empty: work/ beside the notebooks
profile: str = "auto"  # auto, demo (no GPU, no network) or kaggle: what an empty parameter means
seed: int = 0  # fixes the split of patients
image_size: int = 0  # side of the stored films in pixels; 0: 64 in the demo, 224 on Kaggle
max_films: int = 0  # at most so many films, of whole patients, for a quick first result; 0: all
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
# ## Patients are split before anything else
#
# With NIH's official lists, the test list is the test set, and one in eight of the other patients is
# set aside for validation. Without lists, a hash of (seed, patient) decides, so that a hospital on
# its own gets the same answer. No patient is in two splits; the code raises an error if one were.

# %%
settings = fedutils.read_parameters(globals())
data = fedutils.open_data(settings.data_dir, settings.work_dir, settings.findings)
table = data.table.assign(split=fedutils.split_patients(data.table, settings.seed))
table = fedutils.choose_films(table, settings.max_films, settings.seed)
fedutils.check_splits(table[table["path"] != ""], settings.seed)

# %% [markdown]
# How many films and patients that makes:

# %%
counts = table.groupby("split")["patient_id"].agg(films="size", patients="nunique")
counts.reindex(["train", "val", "test"], fill_value=0)

# %% [markdown]
# ## Decode once
#
# Each film becomes one grey channel, whatever its colour mode, and is resized. All cores work; a
# journal is written behind each chunk of films.

# %%
from pathlib import Path
from IPython.display import HTML, Markdown

size, prepared = settings.image_size, Path(settings.work_dir) / "prepared"
display(Markdown(f"The store will take **{len(table) * size**2 / 1e9:.2f} GB** at {size} x {size} pixels."))
live = display(Markdown("decoding ..."), display_id=True)
films = fedutils.decode_films(
    table, data.folder, prepared, size,
    progress=lambda done, total: live.update(Markdown(f"{done:,} of {total:,} films decoded")),
)

# %% [markdown]
# ## What the pixels say
#
# Films that cannot be read are left out and named here. Odd colour modes and sizes, and films with
# exactly the same pixels, are named and kept. Near-equal films of two patients are searched for, which
# takes seconds, and minutes for all of NIH's films.

# %%
def count(counts):
    return ", ".join(f"{number:,} x {kind}" for kind, number in counts.items())


about = data.about() | fedutils.prepared_with(settings)
report = fedutils.write_index(table, films, data.boxes, prepared, about)
display(Markdown(
    f"**{report['films']:,} films of {report['patients']:,} patients** are prepared, with "
    f"{report['boxes']} boxes. Groups of films with the same pixels: {len(report['duplicates'])}. "
    f"Colour modes: {count(report['modes'])}. Sizes: {count(report['sizes'])}."
))

# %% [markdown]
# The films that were left out, with the reason:

# %%
import pandas as pd

broken = pd.Series(report["quarantined"], name="reason", dtype=object)
display(broken.to_frame() if len(broken) else Markdown("None: every film could be read."))

# %% [markdown]
# A film that two patients share, packed or scaled or cut a little otherwise, is a leak if one of them is
# in training: one patient may have two ids. `twins="drop"` leaves out all films that are named here.

# %%
near = pd.DataFrame(report["near_equal"], columns=["film", "near-equal to", "in two splits"])
display(Markdown(
    f"Pairs of near-equal films of two patients: **{len(near)}**, {int(near['in two splits'].sum())} of them"
    f" in two splits{' (left out)' if settings.twins == 'drop' and len(near) else ''}."
))
display(near.head(20) if len(near) else Markdown("None is named."))

# %% [markdown]
# ## Does any film lie on its side?
#
# The mean film of each hospital, or scanner, shows at once what came inverted or sideways as a whole.

# %%
index = fedutils.read_index(prepared)
means = fedutils.mean_films(fedutils.ChestXrayDataset(prepared).store, index)
fedutils.plots.film_grid(list(means.values()), list(means), data.release, "The mean film of each")

# %% [markdown]
# Single films are compared with the mean of the others, upright, inverted and turned, and by their edges.
# Nearly all that are inverted or turned are found, most mirrored ones, and films of something else than a
# frontal chest; of the untouched ones up to 1 % are named, too. So look before `suspects="drop"` leaves them out.

# %%
wrong = pd.DataFrame(report["look_wrong"], columns=["film", "looks"])
display(Markdown(
    f"Films that look wrong: **{len(wrong)}**{' (left out)' if settings.suspects == 'drop' and len(wrong) else ''}."
))
display(wrong.head(20) if len(wrong) else Markdown("None is named."))

# %% [markdown]
# ## Are the splits alike?
#
# The share of labelled films with each finding, by split. NIH's own test list has more sick patients
# than its training list; a random split of patients has not.

# %%
shares = index.groupby("split")[report["outputs"]].mean().T
shares = shares.reindex(columns=["train", "val", "test"])
HTML(shares.to_html(float_format="{:.1%}".format, na_rep="not labelled"))

# %% [markdown]
# ## What the network will see
#
# Ten prepared films, read back from the store at the size that is trained on. Black bars, text in the
# corners and tubes stay in: that is what real films look like.

# %%
dataset = fedutils.ChestXrayDataset(prepared)
some = dataset.index.iloc[:: max(1, len(dataset) // 10)].head(10)
labels = some[dataset.findings].to_dict("records")
titles = [fedutils.format_labels(row).replace("|", "\n") for row in labels]
fedutils.plots.film_grid([dataset[i][0][0].numpy() for i in some.index], titles, data.release)

# %% [markdown]
# ## The fingerprint
#
# It stands for films, labels, split and size. Each training run stores it; notebooks 03 and 04 refuse
# to go on with data that have another one.

# %%
display(Markdown(f"Fingerprint: `{report['fingerprint'][:16]}` ..."))

# %% [markdown]
# Next: `03_federated_train` trains on these films without moving them.
