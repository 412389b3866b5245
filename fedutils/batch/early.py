"""What the films on hand show to be impossible, said before the first notebook starts."""

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from ..base.errors import InputError
from ..base.findings import NO_FINDINGS, choose_findings, findings_of
from ..base.parameters import split_list
from ..dataset import ChestXrayDataset, read_index, read_report
from ..evidence.tables import read_summary
from ..films import find, partition, prepared, sources, split
from ..films.phantom.cases import FINDINGS, phantom_table
from ..model import build_resnet34
from ..rounds import Progress, over_budget
from ..settings import Settings
from ..strategies import STRATEGIES
from ..training import arms, identity
from .notebook import EVALUATE, READ_FILMS, TRAINS
from .trained import read_run


def check_early(runs: Sequence[Settings], due: Collection[str]) -> None:
    """Raise InputError for what would stop one of the notebooks that are due, and is known now.

    `runs` share their films. Those that notebook 02 is to decode are taken to be readable; what it
    has prepared already is what a later notebook will read.
    """
    if EVALUATE in due and len(runs) == 1:  # a sweep lays its own runs side by side
        for other in runs[0].compared:
            read_summary(read_run(runs[0].work_dir, other))
    for asked in runs if TRAINS in due else ():
        identity.check_run(asked, server=identity.name_class(STRATEGIES[asked.strategy]))
    films = _find_films(runs[0], due)
    for settings in runs if films is not None and TRAINS in due else ():
        _check_training(settings, films)


def _find_films(settings: Settings, due: Collection[str]) -> pd.DataFrame | None:
    """Return the films that notebook 03 will read, if they are known, with their `split`."""
    films = None
    if settings.data_dir and not set(READ_FILMS).isdisjoint(due):
        films = sources.open_data(settings.data_dir, settings.work_dir, settings.findings).table
    if READ_FILMS[1] in due:
        if films is None:
            films = _phantom(settings.findings)
        find.check_films(films, Path(settings.data_dir), Path(settings.work_dir))
        films = films.assign(split=split.split_patients(films, settings.seed))
        films = split.choose_films(films, settings.max_films, settings.seed)
        films = films[films["path"] != ""]
        split.check_splits(films, settings.seed)
        return films
    if TRAINS not in due:
        return None
    try:
        report, films = read_report(settings.prepared), read_index(settings.prepared)
    except (OSError, ValueError, KeyError):  # not there, or damaged: notebook 03 says what to do
        return None
    prepared.check_prepared(settings, report, films)
    return films


def _phantom(findings: str) -> pd.DataFrame:
    """Return the table of the phantom's films as `open_data` will, without a film being drawn."""
    names = {"Image Index": "image_index", "Follow-up #": "follow_up", "split": "official_split"}
    table = phantom_table().drop(columns="scanner").rename(columns=names)
    table["patient_id"], table["path"] = table["Patient ID"].astype(str), table["image_index"]
    table["source"], table["scanner"] = "", table["Spacing"].map("{:.3f}".format)
    words = table["Finding Labels"].str.split("|")
    labels = [[float(name in said) for name in FINDINGS] for said in words]
    chosen = pd.DataFrame(labels, columns=FINDINGS)[choose_findings(FINDINGS, findings)]
    return table[table.columns.intersection(list(NO_FINDINGS), sort=False)].join(chosen)


def _check_training(settings: Settings, films: pd.DataFrame) -> None:
    """Plan the training of these films, `split` among their columns, as notebook 03 will."""
    clients = partition.partition_patients(
        films, settings.partition, settings.num_clients, settings.alpha, settings.seed
    ).set_index("patient_id")["client"]
    films = films[films["split"] != ""]
    films = films.assign(client=films["patient_id"].map(clients))
    jobs = arms.plan(settings, _without_pixels(films))
    if settings.total_epsilon and not (settings.run / "config.json").is_file():
        data, server = "", identity.name_class(STRATEGIES[settings.strategy])
        with suppress(ValueError, KeyError):  # known, a model that the ledger has costs no more
            data = read_report(settings.prepared)["fingerprint"]
        identity.keep_ledgers(jobs, identity.check_run(settings, server=server, fingerprint=data))
    for job in jobs:
        if reason := over_budget(job, Progress({}), job.settings):
            raise InputError(f"{job.name} {reason}: not even one round is possible")
    layers = {"all", "layer4"} & {*split_list(settings.tracked)}
    if settings.image_size == 32 and settings.batchnorm != "frozen" and layers:
        for client in (client for job in jobs for client in job.clients):
            count = len(client.films)
            if count // math.ceil(count / settings.batch_size) == 1:  # as it deals them to batches
                has = f"{count} training film{'s' * (count > 1)}"
                what = f"batch_size={settings.batch_size}: {client.name} has {has}"
                raise InputError(
                    f"{what}, and BatchNorm cannot learn from a batch of one film of 32 pixels;"
                    " choose another batch_size, a larger image_size or fewer clients"
                )
    if settings.weights != "none":
        outputs = len(findings_of(films))
        build_resnet34(settings.weights, settings.tracked, settings.batchnorm, outputs=outputs)


def _without_pixels(index: pd.DataFrame) -> ChestXrayDataset:
    """Return the films of a table, of which nobody will read the pixels."""
    films = object.__new__(ChestXrayDataset)
    films.index, films.store = index.reset_index(drop=True), None
    films.labels = index[findings_of(index)].to_numpy(np.float32)
    films._rows = np.arange(len(index))
    return films
