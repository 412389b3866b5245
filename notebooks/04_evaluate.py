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
# reports AUROC and average precision for all findings with 95 % intervals over patients.
#
# **Reads** `work/prepared/` and `work/runs/NAME/`. **Writes** `work/runs/NAME/evaluation/`:
# `predictions.csv.gz`, `metrics.csv`, `differences.csv`, `summary.json`, tables of calibration, operating
# points and pointing, and the figures; beside it `MODEL_CARD.md`. **Takes** seconds for the demo,
# minutes for 20 models on all of NIH's test films.

# %% tags=["parameters"]
work_dir: str = ""  # where results are; empty: work/ beside the notebooks
name: str = ""  # of the run; empty: the latest
device: str = "auto"  # auto, cpu or cuda:0
cache_features: bool = False  # read the trunk's output from notebook 03's store, where it is there
compare: str = ""  # names of other runs, such as A,B, to lay beside this one

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
# ## The run, and its data
#
# The run says which data it was trained on. If notebook 02 has prepared other data since, this stops
# here and says so.

# %%
from IPython.display import HTML, Image, Markdown

settings = fedutils.read_evaluated(globals())
report = fedutils.read_data(settings)
fedutils.check_fingerprint(settings, report)
fedutils.leave_out(globals(), settings)  # of a run over a network, whose films are not here
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
from fedutils import plots

folder = settings.run / "evaluation"
stored = fedutils.stored_features(settings, films)  # of a cached trunk; else the films
predicted = fedutils.predict_films(settings, stored, "test")
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
warning = fedutils.too_small(result, films.index[films.index["split"] == "test"])
display(HTML(f'<p style="color: #b00020">{warning}</p>' if warning else ""))
display(Markdown(fedutils.bullets(summary["headline"])))

# %% [markdown]
# The primary figure is the mean over one fixed set of findings, those that at least ten test patients
# have, and ten have not. Labels alone decide, no model. Here they are:

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
# A point is the AUROC, the bar its 95 % interval over patients (a score interval); 0.5 is guessing. Small circles are the
# models of single hospitals. Published figures appear only if these are NIH's own films with NIH's own
# test list: other splits do not compare. Two controls are ticks: what age, sex, view and scanner tell without
# any film, by a logistic regression on the training patients, and the first model against shuffled labels.

# %%
controls = fedutils.control_scores(predictions, films.index, result.mean_over, settings.seed)
controls.to_csv(folder / "controls.csv")
yardsticks = report["yardsticks"] if report["films"] > 100_000 else None
plots.save(plots.auroc_forest(result.metrics, yardsticks, title, controls), folder / "auroc.png")

# %% [markdown]
# Which of the two it is here, and what has to be beaten:

# %%
note = "Published AUROCs of the official split are drawn in." if yardsticks else (
    "No published figure is drawn in: these are not all films of NIH's official split.")
display(Markdown(f"{note} {fedutils.plain(fedutils.control_words(controls, result.metrics))}"))

# %% [markdown]
# ## ROC curves
#
# Sensitivity against the share of false alarms, one panel for each finding, of the first model of the
# run. The dotted diagonal is guessing.

# %%
test = films.where(films.index["split"] == "test")
first = predictions[["arm", "seed", "client"]].head(1)
scores, truth = predictions.merge(first)[films.findings], test.index[films.findings]
plots.save(plots.roc_curves(truth, scores, title), folder / "roc.png")

# %% [markdown]
# ## Precision-recall curves
#
# For rare findings these tell more: of the films that the model marks, how many are right? The dotted
# line is the prevalence, which is what guessing gives.

# %%
plots.save(plots.pr_curves(truth, scores, title), folder / "precision_recall.png")

# %% [markdown]
# ## Differences between the arms
#
# The federated model minus each other one, on the same draws of patients. Intervals hold two components,
# patients and training seeds (Satterthwaite's t): with one seed nothing is judged. The primary hypotheses
# are two, the mean AUROC on all films against centralised and against the mean local model; all other p
# are adjusted together (Holm). Otherwise no difference is shown, which does not say that there is none:
# beside it stands what three seeds a side would show in four of five repetitions.

# %%
alone = f"Only one arm was trained ({settings.arms}): nothing to compare it with."
differences = fedutils.tabulate_differences_text(result.differences)
HTML(differences.to_html(index=False)) if len(differences) else Markdown(alone)

# %% [markdown]
# The same as a picture, by finding too. Filled points are shown differences, hollow ones are not; the
# short upright lines are the smallest and the largest value over the pairs of training seeds.

# %%
if len(result.differences):
    display(plots.save(plots.difference_forest(result.differences, title), folder / "differences.png"))

# %% [markdown]
# ## Fairness between hospitals
#
# Every model on every hospital's own test films, over the findings that all hospitals have enough of;
# where they look for different ones, over those that a hospital and the others together have enough of. A
# frame marks a local model at home: does federation give that hospital more than it had?

# %%
plots.save(plots.client_matrix(result.metrics, title), folder / "hospitals.png")

# %% [markdown]
# The first arm by hospital, the lowest first, over these findings; beside it the mean over the same findings
# on all films. Intervals that overlap show no worst one:

# %%
at_hospitals = fedutils.hospitals(result.metrics, settings.arm_list[0]).sort_values("value")
at_hospitals = at_hospitals.rename(columns={"positives": "findings", "on_all_films": "on all films"})
shown = ["arm", "test_set", "value", "ci_low", "ci_high", "on all films", "findings", "n"]
HTML(at_hospitals[shown].to_html(index=False, float_format="{:.3f}".format))

# %% [markdown]
# What does each hospital gain by taking part? *At home* are its own test films: the federated model minus
# the hospital's own, on the same draws of patients. *Outside* are the test films of all others: what its
# own model would be worth elsewhere. Both are means over the same findings.

# %%
homes = fedutils.tabulate_homes(result)
HTML(homes.to_html(index=False)) if len(homes) else Markdown("That wants the arms `federated` and `local`.")

# %% [markdown]
# ## Subgroups
#
# Mean AUROC by sex, age, view position and scanner, each family over the findings that all its groups
# have enough of. Grey groups hold under 30 positive labels: nothing is to be concluded from them. The
# last line takes one film a patient, the first, so that no patient counts more than another.

# %%
plots.save(plots.subgroup_forest(result.metrics, title), folder / "subgroups.png")

# %% [markdown]
# ## What it cost
#
# The AUROC on validation films after each round, against the gigabytes that travelled until then and the
# films that were trained on. Only federation sends models; centralised training sends the films.

# %%
history = fedutils.read_history(settings.run)
cost = fedutils.training_cost(history, settings, films.index["client"].nunique())
plots.save(plots.cost_curves(cost, title), folder / "cost.png")

# %% [markdown]
# What each arm had spent when it was best on validation, the mean over seeds:

# %%
known = cost.dropna(subset="val_auroc")
best = known.loc[known.groupby(["arm", "seed"], sort=False)["val_auroc"].idxmax()]
best = best.groupby("arm", sort=False)[["round", "films_seen", "gigabytes", "val_auroc"]].mean()
HTML(best.to_html(float_format="{:,.3f}".format))

# %% [markdown]
# ## Beside other runs
#
# `compare` names runs on the same films, such as other partitions; a sweep names them by itself. Their
# federated models are compared on the same draws of patients.

# %%
others = [fedutils.read_run(work_dir, other, device) for other in settings.compared]
beside = fedutils.compare_runs([*others, settings]) if others else None
none = Markdown("No other run was named.")
none if beside is None else HTML(fedutils.tabulate_differences_text(beside.differences).to_html(index=False))

# %% [markdown]
# Every arm of these runs, with the intervals of its mean AUROC:

# %%
if beside is not None:
    display(plots.save(plots.run_forest(beside.metrics, report["release"]), folder / "compare.png"))

# %% [markdown]
# ## On films from elsewhere
#
# `python -m fedutils test RUN --data DIR` puts these models on films that they never saw, of any data set.
# Intervals are over patients; the difference is external minus internal, of these very models, over the
# findings that both sides have patients enough of. `local` is the mean local model. Controls are fitted on
# this run's training films; more, such as cuts chosen on its validation films, lies in `external/`.

# %%
said, external = fedutils.read_external(settings)
none = "There is no external test: `python -m fedutils test work/runs/NAME --data DIR` makes one."
display(Markdown(fedutils.bullets(said) or none))
display(HTML(external.to_html(index=False) if len(external) else ""))
display(*map(Image, sorted(map(str, settings.run.glob("external/*/auroc.png")))))

# %% [markdown]
# ## Calibration
#
# Is a finding there in 20 % of the films that are given 0.20? Brier: mean squared error of the
# probability. ECE: the gap between predicted and observed in 15 bins of equal width, weighted by films;
# it is never 0, so beside it stands what it would be if the probabilities were right.
# Slope under 1: the model is too sure; intercept above 0: it says too little. Always giving the
# prevalence is perfectly calibrated and worthless: read them beside AUROC. In brackets, 95 % intervals
# over patients.

# %%
calibration = fedutils.calibrate(predictions, films.index, settings.seed)
calibration.to_csv(folder / "calibration.csv", index=False)

# %% [markdown]
# The federated model of the first seed (without that arm: the first model), on all films by finding.

# %%
main = fedutils.main_model(calibration)
own = calibration.merge(main)
whole = fedutils.tabulate_calibration(own[own["hospital"] == ""])
HTML(whole.drop(columns="hospital").to_html(index=False))

# %% [markdown]
# Its means over the findings by hospital, of slope and intercept, too. A model may be calibrated on
# average and nowhere at home.

# %%
of_means = fedutils.tabulate_calibration(own[own["finding"] == "mean"])
HTML(of_means.drop(columns=["finding", "positives"]).to_html(index=False))

# %% [markdown]
# As a picture. Left, on the dotted line a prediction means what it says; the larger the dot, the more
# films. Of rare findings nearly all films are in the first bin, so few films make the dots at the right.

# %%
mine, test = predictions.merge(main), films.where(films.index["split"] == "test")
chances = mine[films.findings].to_numpy()
figure = plots.reliability_diagram(test.labels, chances, own[own["hospital"] == ""], title)
plots.save(figure, folder / "calibration.png")

# %% [markdown]
# ## Operating points
#
# Where to cut a probability is chosen on validation films, and judged on test films: *Youden* makes
# sensitivity + specificity largest, the other cut is the highest that still finds 90 % of the
# validation films with the finding; on test films that can be more or less.

# %%
seen = fedutils.predict_films(settings, stored, "val")
validation = fedutils.write_predictions(seen, folder / "validation.csv.gz")
points = fedutils.operating_points(validation, predictions, films.index)
points.to_csv(folder / "operating_points.csv", index=False)

# %% [markdown]
# The same model's, with 95 % intervals over patients. PPV, the share of alarms that are right, and NPV
# hold **at the prevalence that stands beside them**: where a finding is rarer, more alarms are false. *No
# cut*: validation lacks films with the finding, or without it.

# %%
HTML(fedutils.tabulate_points(points.merge(main)).to_html())

# %% [markdown]
# ## Where it looks
#
# Grad-CAM on `layer4` marks what raises a finding's score. In the *pointing game* its hottest cell
# must lie in a box that was drawn for that finding on that film: no tolerance, and with several boxes
# any of them counts. Position alone can win it, so two points stand beside the model that never look:
# the image centre, and the best fixed point *fitted on other patients' films* (a finding that only one
# patient has boxes of has none).

# %%
pointing = fedutils.pointing_game(settings, films)
pointing.to_csv(folder / "pointing.csv", index=False)
display(Markdown(fedutils.plain(fedutils.pointing_words(pointing, settings.image_size))))

# %% [markdown]
# As a picture, where it could be played. Bars are 95 % intervals over patients; the orange tick is the
# upper bound of a fixed point, since it was fitted on these very boxes.

# %%
if len(pointing):
    display(plots.save(plots.pointing(pointing, title), folder / "pointing.png"))

# %% [markdown]
# The films by a fixed rule: for each finding the true positive and the false positive with the highest
# probability, and the missed film with the lowest, cut at *Youden*. Boxes are orange; the more blue,
# the more the place raised the score (from 224 pixels on). *No film*: there is none of that kind, or
# validation gave no cut. An empty box list of a film does not mean that nothing is there.

# %%
panels = fedutils.pick_gallery(mine, points.merge(main), films.index)
panels = fedutils.fill_gallery(settings, test, panels, main)
plots.save(plots.gallery(panels, title), folder / "gallery.png")

# %% [markdown]
# ## The model leaves
#
# `global_model.safetensors` needs nothing of this project: torchvision loads it, and a film needs only
# to be grey, of the run's size, and normalised as for ImageNet.

# %%
import torch
from safetensors.torch import load_file
from torchvision.models import resnet34


def predict_alone(path, film):
    model = resnet34(num_classes=len(films.findings))
    model.load_state_dict(load_file(path))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        return model.eval()((film / 255 - mean)[None] / std).sigmoid()[0].numpy()

# %% [markdown]
# One test film, and what the run itself said of it:

# %%
path, said = settings.run / "global_model.safetensors", "No federated arm, so no global model leaves."
if path.is_file():
    gap = abs(predict_alone(path, test[0][0]) - chances[0]).max()
    same = "the same" if gap < 1e-5 else "not the same (half precision, or local BatchNorm)"
    film = test.index["image_index"][0]
    said = f"Film {fedutils.plain(film)}: torchvision alone and the run differ by at most {gap:.1e}, which is {same}."
display(Markdown(said))

# %% [markdown]
# The model card goes with it, as `MODEL_CARD.md` in the run's folder. What was written since the
# summary is added to the hashes there.

# %%
card = fedutils.write_card(settings)
tables = ("validation.csv.gz", "controls.csv", "calibration.csv", "operating_points.csv", "pointing.csv")
fedutils.record_files(settings, "MODEL_CARD.md", *(f"evaluation/{table}" for table in tables))
display(Markdown("> " + card.replace("\n", "\n> ")))

# %% [markdown]
# ## What the model remembers
#
# An attack that anyone can run who has the model and a patient's films: is the loss on them lower
# than on films that it never saw? Members are training patients, the others validation patients,
# as many of each at each hospital.

# %%
drawn = fedutils.attack_films(stored, settings.seed)
seen = [fedutils.predict_films(settings, drawn, split) for split in ("train", "val")]
attack = fedutils.attack_models(seen, films, settings.seed)
attack.to_csv(folder / "membership.csv", index=False)
fedutils.record_files(settings, "evaluation/membership.csv")

# %% [markdown]
# An area of 0.5 is guessing. The rate at 1 % false positives says how many members are found while
# hardly anyone is accused wrongly; it takes 300 others to state it. Validation patients chose the
# round, so they are not quite strangers to the model.

# %%
display(Markdown(fedutils.bullets(fedutils.membership_words(attack))))

# %% [markdown]
# What was promised to these patients in training. A weak attack that finds nothing proves nothing; an
# epsilon holds against every attack.

# %%
display(Markdown(fedutils.bullets(fedutils.privacy_words(settings))))

# %% [markdown]
# ## What this is, and what it is not
#
# Labels first: how did they come about? Films stayed with their
# client, but updates can leak unless `dp=patient` says otherwise. Not for clinical use.

# %%
display(Markdown(f"**{fedutils.plain(report['source'])}.** {fedutils.plain(report['labels_by'])}"))

# %% [markdown]
# `summary.json` holds what it takes to repeat this run: parameters, versions, threads, device, the
# revision of the code, the fingerprint of the data, and hashes of models and predictions.
