"""Federated learning on chest X-rays: the names that the notebooks use, handed on."""

from . import plots
from .client import Client, Update, predict
from .federation import FederationError, Training, predict_films
from .fedavg import STRATEGIES, FedAvg
from .findings import FINDINGS, InputError, format_labels, parse_labels
from .images import ChestXrayDataset, choose_films, decode_films, read_index, write_index
from .metrics import evaluate
from .model import build_resnet34
from .nih import check_table, find_data, read_nih, summary
from .partition import label_skew, partition_patients, partition_report, split_patients
from .phantom import write_phantom
from .settings import Settings, __version__, print_environment, read_parameters

__all__ = [
    "FINDINGS", "STRATEGIES", "ChestXrayDataset", "Client", "FedAvg", "FederationError",
    "InputError", "Settings", "Training", "Update", "__version__", "build_resnet34", "check_table",
    "choose_films", "decode_films", "evaluate", "find_data", "format_labels", "label_skew",
    "parse_labels", "partition_patients", "partition_report", "plots", "predict", "predict_films",
    "print_environment", "read_index", "read_nih", "read_parameters", "split_patients", "summary",
    "write_index", "write_phantom",
]  # fmt: skip
