"""Federated learning on chest X-rays: the names that the notebooks use, handed on."""

from importlib import import_module
from types import ModuleType

from .calibration import calibrate, main_model, operating_points, tabulate_points
from .card import write_card
from .client import Client, Update, predict
from .evaluation import (
    check_fingerprint,
    compare_runs,
    evaluate_models,
    hospitals,
    predict_films,
    read_films,
    record_files,
    tabulate,
    tabulate_differences_text,
    training_cost,
    write_predictions,
    write_summary,
)
from .explain import fill_gallery, pick_gallery, pointing_game, pointing_words
from .fedavg import STRATEGIES, FedAvg
from .federation import FederationError, Training, best_rounds, read_history
from .findings import FINDINGS, InputError, format_labels, parse_labels
from .images import (
    ChestXrayDataset,
    choose_films,
    decode_films,
    example_films,
    read_index,
    read_report,
    write_index,
)
from .metrics import YARDSTICKS_OFFICIAL
from .model import build_resnet34
from .nih import check_table, open_data, summary
from .partition import (
    label_skew,
    leak_of_splits,
    partition_patients,
    partition_report,
    split_patients,
)
from .phantom import write_phantom
from .settings import (
    Settings,
    __version__,
    fetch_runs,
    print_environment,
    read_parameters,
    read_run,
)


def __getattr__(name: str) -> ModuleType:
    """Import `fedutils.plots` at its first use: the figures' libraries take a second or two."""
    if name == "plots":
        return import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
