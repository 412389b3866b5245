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
# # 3 · Train federatedly
#
# **What it does.** Several hospitals (*clients*) train a ResNet-34 on their own films. In each round
# every client trains locally and sends only the tracked layers; the server takes the weighted
# average (FedAvg). No film leaves its client.
#
# **Reads** `work/prepared/`. **Writes** `work/runs/NAME/`: `history.csv`, `clients.csv`, `models/`,
# `checkpoint/`, `global_model.safetensors`. **Takes** about two minutes for the demo on two slow cores;
# an estimate for this device is printed before training. Killed at any moment, it goes on from the
# last round boundary and ends with the same bits.

# %% [markdown]
# These are the parameters that people change. All others are accepted in this cell too, and as `-p mu=0.3`
# on the command line; `python -m fedutils parameters` lists them with their meaning.

# %% tags=["parameters"]
data_dir: str = ""  # as in notebook 02; only names the data, as the films come from work/prepared
work_dir: str = ""  # where results go; empty: work/ beside the notebooks
name: str = ""  # of this run; empty: a short hash of the parameters
profile: str = "auto"  # auto, demo (no GPU, no network) or kaggle: what an empty parameter means
seed: int = 0  # fixes the split of patients and the partition to clients
tracked: str = ""  # layers that are trained and sent: layer4,fc or all; empty: all without ImageNet weights
partition: str = "iid"  # of patients to clients: iid, dirichlet or scanner
num_clients: int = 0  # hospitals; 0: 4 in the demo, 5 on Kaggle
strategy: str = "fedavg"  # fedavg, fedavgm, fedadam, fedprox or scaffold
rounds: int = 0  # rounds of federation; 0: 4 in the demo, 15 on Kaggle
lr: float = 0.0  # learning rate; 0: 0.0004 for random weights, else 0.001
dp: str = "off"  # off or patient: differential privacy of each training patient
arms: str = "federated"  # what to train: federated,centralised,local
seeds: str = "0"  # training seeds, such as 0,1,2
max_hours: float = 0.0  # stop cleanly at a round boundary before this; 0: never

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
# ## The films, and which hospital has them
#
# Patients, never films, are placed at clients; test patients too, so that each hospital has test films
# of its own. What notebook 02 has used, such as `max_films`, is to be given here too. On Kaggle the
# films come from the output of notebook 02, and runs from the output of an earlier version of this
# notebook, where they are attached: a run goes on from there.

# %%
settings = fedutils.read_parameters(globals())
fedutils.fetch_runs(settings.work_dir)
report = fedutils.read_report(settings.prepared)
index = fedutils.read_index(settings.prepared)
fedutils.check_prepared(settings, report, index)
clients = fedutils.partition_patients(
    index, settings.partition, settings.num_clients, settings.alpha, settings.seed)

# %% [markdown]
# The placement is saved with the run: which patient is at which client, and in which split.

# %%
settings.run.mkdir(parents=True, exist_ok=True)
clients.to_csv(settings.run / "clients.csv", index=False)
index["client"] = index["patient_id"].map(clients.set_index("patient_id")["client"])
films = fedutils.ChestXrayDataset(settings.prepared, index)
title = f"{report['release']} data, {settings.partition}"

# %% [markdown]
# How the hospitals differ before any training. Colours compare a hospital with all films together:
# one even colour in each column means that the clients are alike.

# %%
per_client = fedutils.partition_report(index, clients)
fedutils.plots.client_heatmap(per_client, title)

# %% [markdown]
# The same in one number, for comparing partitions:

# %%
from IPython.display import HTML, Markdown

skew = fedutils.label_skew(index, clients)
display(Markdown(
    f"{len(per_client)} clients with {per_client['films'].min():,} to {per_client['films'].max():,} films."
    f" **Label skew {skew:.3f} bits** (Jensen-Shannon divergence, weighted by films; 0 = all alike)."
))

# %% [markdown]
# ## The model, and what travels
#
# A ResNet-34 with an output, a sigmoid, for each finding. Only the tracked layers are trained and sent. What is
# not tracked is frozen: its weights *and* its BatchNorm statistics stay bit-identical.

# %%
model = fedutils.build_resnet34(
    settings.weights, settings.tracked, settings.batchnorm, outputs=len(films.findings))
size = model.sizes()
display(Markdown(
    f"Weights {fedutils.plain(settings.weights)}, tracked layers `{settings.tracked}`: **{size['trained']:,} of "
    f"{size['parameters']:,} parameters** are trained; **{size['sent_bytes'] / 1e6:.1f} MB** travel in "
    f"each direction, a client and round ({size['sent_bytes'] / size['all_bytes']:.0%} of the model)."
))

# %% [markdown]
# ## How long will it take?
#
# A few batches are timed on this device; nothing of them is kept.

# %%
training = fedutils.Training(settings, films)
estimate = training.estimate_seconds()
cache = training.features.describe() if training.features else ""
display(Markdown(f"Training will take about **{estimate / 60:.1f} minutes** on this device. {cache}"))

# %% [markdown]
# ## The rounds
#
# One round, as on paper: send the state, train at each client, average by numbers of films in the
# order of the clients, take the strategy's step. The validation loss is that of the *aggregated*
# model, not of the client that happened to be last.

# %%
live = display(Markdown("waiting for the first round ..."), display_id=True)


def show(row, history):
    live.update(fedutils.plots.learning_curves(history, title))
    seen = f"epsilon {row['epsilon']:.3f}" if settings.dp != "off" else f"train loss {row['train_loss']:.4f}"
    print(f"{row['arm']} s{row['seed']} {row['client']} round {row['round']}: {seen}, "
          f"validation loss {row['val_loss']:.4f}, "
          f"AUROC {row['val_auroc']:.3f}, {row['seconds']:.0f} s", flush=True)


def show_features(done, total):
    live.update(Markdown(f"the frozen trunk: {done:,} of {total:,} films"))


history = training.train(show, show_features)
done = (settings.run / "finished.json").is_file()
live.update(Markdown("All rounds are done; the curves stand below." if done else (
    "**Stopped at `max_hours`, after a whole round.** Run this notebook again to go on; on Kaggle, attach"
    " the output of this version to the next one first.")))

# %% [markdown]
# ## Learning curves
#
# Left: loss, on training films (as the clients saw them while they learned) and on validation films
# (the aggregated model). Right: the mean AUROC on validation films; its best round is the one kept.
# Models of the arm `local` are judged on their own hospital's validation films. With
# `batchnorm="average"` the validation loss jumps in early rounds, since averaged statistics lag
# behind averaged weights; `precise` measures those of the aggregated model.

# %%
fedutils.plots.learning_curves(history, title)

# %% [markdown]
# The best round of each model on validation films; notebook 04 evaluates that one.

# %%
best = fedutils.best_rounds(history)[["arm", "seed", "client", "round", "val_loss", "val_auroc"]]
HTML(best.to_html(index=False, float_format="{:.3f}".format))

# %% [markdown]
# ## What each client contributed
#
# The last round, client by client. A client that failed would stand here with its reason.

# %%
shown = ["client", "examples", "train_loss", "bytes_up", "bytes_down", "seconds", "status", "reason"]
per_round = history[(history["arm"] == "federated") & (history["client"] != "")]
last = per_round[per_round["round"] == per_round["round"].max()]
HTML(last[shown].to_html(index=False, float_format="{:.3f}".format))

# %% [markdown]
# Faults over all rounds, what the federation sent in all, and how far off the estimate was:

# %%
off = training.seconds / estimate - 1 if estimate else 0
said = f", {abs(off):.0%} {'more' if off > 0 else 'less'} than estimated" if estimate else ""
faults = history[~history["status"].isin(["ok"])]
sent_gb = per_round[["bytes_up", "bytes_down"]].to_numpy().sum() / 1e9
display(faults[["round", "client", "status", "reason"]] if len(faults) else Markdown("No client failed."))
display(Markdown(
    f"**{sent_gb:.2f} GB** travelled in all. This session trained for "
    f"**{training.seconds / 60:.1f} minutes**{said}."
))

# %% [markdown]
# What the run promises the patients it learned from:

# %%
display(Markdown(fedutils.bullets(fedutils.privacy_words(settings))))

# %% [markdown]
# Next: `04_evaluate` looks at the test films, once.
