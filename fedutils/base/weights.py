"""The weights that a model starts from, read or drawn; nothing in a file is ever executed."""

import math
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import ResNet34_Weights

from .device import find_devices
from .errors import InputError
from .files import KAGGLE, search_files
from .rng import generator
from .state import State

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
        what = f"weights={weights!r}: {path or url} cannot be read ({error})"
        way = "give weights=PATH of a resnet34-*.pth, attach that file, or use weights=none"
        raise InputError(f"{what}; {way}") from error


def find_weights(weights: str) -> Path | None:
    """Return the file that `weights` means, or None where it would have to be downloaded."""
    if weights == "imagenet":
        places = [KAGGLE_INPUT, Path(torch.hub.get_dir()) / "checkpoints"]
        return next((f for place in places for f in search_files(place, "resnet34-*.pth")), None)
    if not Path(weights).is_file():
        raise InputError(f"weights={weights!r}: no such file; or use imagenet or none")
    return Path(weights)


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw the weights as torchvision does (He et al., ICCV 2015), but from the seed."""
    source = torch.Generator().manual_seed(int(generator(seed, "weights").integers(2**63)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, 0, "fan_out", "relu", source)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound, source)
            # Findings are rare: start at 5, not 50 % (Lin et al., ICCV 2017); no data is used.
            nn.init.constant_(module.bias, math.log(0.05 / 0.95))


def load_trunk(model: nn.Module, weights: str) -> None:
    """Load everything but the head, and refuse what is no ResNet-34."""
    found = {k: v for k, v in load_weights(weights).items() if not k.startswith("fc.")}
    # Files older than PyTorch 0.4.1, torchvision's ResNet-34 among them, lack BatchNorm's counter.
    need = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    wrong = {k for k in need.keys() - found.keys() if not k.endswith("num_batches_tracked")}
    wrong |= {k for k, v in found.items() if k not in need or v.shape != need[k].shape}
    if wrong:
        raise InputError(f"weights={weights!r}: no ResNet-34 state dict, see {min(wrong)!r}")
    model.load_state_dict(found, strict=False)


def find_profile() -> str:
    """Return 'kaggle' with a GPU and ImageNet weights, else 'demo'; warn where it disappoints."""
    problem = "there is no GPU" if (KAGGLE / "working").is_dir() else ""
    if find_devices("auto")[0].type != "cpu":
        try:
            if find_weights("imagenet") or load_weights("imagenet"):
                return "kaggle"
        except InputError as error:
            problem = f"there is a GPU, but {error}"
    if problem:
        warnings.warn(
            f"profile=auto is the demo here (64 pixels, no ImageNet weights): {problem}. Attach a"
            " data set with resnet34-b627a593.pth and set profile=kaggle in every notebook for 224"
            " pixels; profile=demo says that the demo is meant",
            stacklevel=2,
        )
    return "demo"
