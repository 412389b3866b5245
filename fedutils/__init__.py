"""Federated learning on chest X-rays: the names that the notebooks use, loaded at first use."""

from importlib import import_module
from typing import Any

from .base import __version__ as __version__

NAMES = {
    "batch.absent": "leave_out",
    "batch.trained": "read_evaluated read_run",
    "base.device": "print_environment",
    "base.files": "fetch_runs",
    "base.errors": "InputError",
    "base.findings": "findings_of format_labels",
    "base.text": "bullets plain",
    "client": "Client Update predict",
    "dataset": "ChestXrayDataset read_index read_report",
    "evidence.calibration": "calibrate",
    "evidence.cuts": "operating_points",
    "evidence.card": "write_card",
    "evidence.compare": "compare_runs",
    "evidence.controls": "control_scores",
    "evidence.explain": "fill_gallery pick_gallery pointing_game",
    "evidence.external": "read_external",
    "evidence.membership": "attack_films attack_models",
    "evidence.metrics": "evaluate_models",
    "evidence.predict": "check_fingerprint predict_films write_predictions",
    "evidence.summary": "record_files write_summary",
    "evidence.tables": "best_rounds hospitals main_model read_data tabulate tabulate_calibration"
    " tabulate_differences_text tabulate_homes tabulate_points training_cost",
    "evidence.words": "control_words membership_words pointing_words privacy_words too_small",
    "fedavg": "FedAvg",
    "films.check": "check_table summary",
    "films.decode": "decode_films example_films write_index",
    "films.partition": "label_skew partition_patients partition_report",
    "films.phantom.write": "write_phantom",
    "films.prepared": "check_prepared prepared_with",
    "films.sources": "compare_sources open_data",
    "films.suspects": "mean_films",
    "films.split": "check_splits choose_films leak_of_splits split_patients",
    "model": "build_resnet34",
    "rounds": "FederationError run_round",
    "run": "read_films read_history",
    "settings": "Settings read_parameters",
    "strategies": "STRATEGIES",
    "training.features": "stored_features",
    "training.replicas": "start_model",
    "training.training": "Training",
}
PLACES = {name: place for place, names in NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import what a name stands for at its first use: torch and the figures take seconds."""
    if name == "plots":
        return import_module(".plots", __name__)
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the names, for completion in a notebook."""
    return sorted([*PLACES, "plots"])
