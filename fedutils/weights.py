"""Find and read the weights that a trunk starts from; nothing in a file is ever executed."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import ResNet34_Weights

from .findings import InputError
from .nih import KAGGLE, search_files

State = dict[str, Tensor]  # names as in the model's state_dict
KAGGLE_INPUT = KAGGLE / "input"


def load_weights(weights: str) -> State:
    """Return a state dict from a path, an attached file or torchvision's download."""
    path, url = find_weights(weights), ResNet34_Weights.IMAGENET1K_V1.url
    try:
        if path is None:
            return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"weights={weights!r}: {path or url} cannot be read ({error}); give weights=PATH of a"
            " resnet34-*.pth, attach that file, or use weights=none"
        ) from error


def find_weights(weights: str) -> Path | None:
    """Return the file that `weights` means, or None where it would have to be downloaded."""
    if weights == "imagenet":
        places = [KAGGLE_INPUT, Path(torch.hub.get_dir()) / "checkpoints"]
        return next((f for place in places for f in search_files(place, "resnet34-*.pth")), None)
    if not Path(weights).is_file():
        raise InputError(f"weights={weights!r}: no such file; or use imagenet or none")
    return Path(weights)
