"""ResNet-34: head swap, tracked layers, frozen trunk."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from .base.device import PRECISIONS, autocast, precision
from .base.errors import InputError
from .base.parameters import Parameters, parameter, split_list
from .base.state import State
from .base.weights import draw_weights, find_weights, load_trunk
from .dataset import normalise

LAYERS = ("all", "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")


@dataclass(frozen=True)
class ModelParameters(Parameters):
    """The network, where it starts, and which of its layers are trained and sent."""

    weights: str = parameter("", "imagenet, none or a file", profiles=("none", "imagenet"))
    tracked: str = parameter(
        "", "layers trained and sent; empty: all if weights=none, else layer4,fc", parts=LAYERS
    )
    batchnorm: str = parameter(
        "precise", "that of tracked layers", allowed=("average", "precise", "frozen", "local")
    )
    precision: str = parameter(
        "auto", "fp32 on the CPU, bf16 where a GPU has it, else fp16", allowed=("auto", *PRECISIONS)
    )

    def check(self) -> None:
        """Raise InputError where the weights cannot be found."""
        if self.weights != "none":
            find_weights(self.weights)


class ChestResNet(ResNet):
    """torchvision's ResNet-34 that knows which of its layers are tracked: trained and sent.

    What is not tracked is frozen: its parameters take no gradient, and its BatchNorm stays in eval
    mode whatever `train()` says. With `batchnorm="frozen"` that of tracked layers does so too.
    """

    def __init__(self, tracked: str, batchnorm: str, outputs: int, precision: str = "auto") -> None:
        super().__init__(BasicBlock, [3, 4, 6, 3], num_classes=outputs)
        self.tracked = tuple(split_list(tracked))
        self.batchnorm, self.precision = batchnorm, precision
        known = ["all", *(name for name, _ in self.named_children())]
        if not set(self.tracked) <= set(known):
            raise InputError(f"tracked={tracked!r}: expected some of {', '.join(known)}")
        for name, weight in self.named_parameters():
            weight.requires_grad_(self.is_tracked(name))

    def is_tracked(self, name: str) -> bool:
        """Tell whether a parameter, buffer or module of this name lies in a tracked layer."""
        return any(layer == "all" or f"{name}.".startswith(f"{layer}.") for layer in self.tracked)

    def train(self, mode: bool = True) -> "ChestResNet":
        """Set the mode, but leave frozen modules and frozen BatchNorm in eval mode."""
        super().train(mode)
        for name, module in self.named_modules():
            frozen = self.batchnorm == "frozen" and is_batchnorm(module)
            if name and (frozen or not self.is_tracked(name)):
                module.training = False
        return self

    def forward(self, films: Tensor, motion: np.ndarray | None = None) -> Tensor:
        """Turn films, or what `features` made of them, into logits (B, outputs).

        With a `motion`, films are augmented. Features (B, 256, h, w) go straight to layer4.
        """
        x = films.float() if films.shape[1] == 256 else self.features(films, motion)
        x = x.contiguous() if x.device.type == "cpu" else x  # as `place` lays layer4 out
        with autocast(films.device, self.precision):
            return self.fc(self.avgpool(self.layer4(x)).flatten(1))

    def features(self, films: Tensor, motion: np.ndarray | None = None) -> Tensor:
        """Run conv1 to layer3: uint8 (B, 1, H, W) or normalised (B, 3, H, W) to (B, 256, h, w)."""
        x = normalise(films, motion) if films.dtype == torch.uint8 else films  # always in float32
        with autocast(films.device, self.precision):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            return self.layer3(self.layer2(self.layer1(x)))

    def computes_in(self) -> str:
        """Name the dtype that this model computes in on its device."""
        return str(precision(self.fc.weight.device, self.precision))

    def tracked_state(self) -> State:
        """Return the tracked entries of the state dict: the live tensors, no copies."""
        return {name: value for name, value in self.state_dict().items() if self.is_tracked(name)}

    def sizes(self) -> dict[str, int]:
        """Count parameters, trained parameters, bytes of all state, bytes of what travels."""
        state, sent = self.state_dict(), self.tracked_state().keys() - self.local_names()
        return {
            "parameters": sum(p.numel() for p in self.parameters()),
            "trained": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "all_bytes": sum(value.nbytes for value in state.values()),
            "sent_bytes": sum(state[name].nbytes for name in sent),
        }

    def local_names(self) -> set[str]:
        """Name the tracked state that stays at home: all of BatchNorm if it is local, else none."""
        layers = [name for name, module in self.named_modules() if is_batchnorm(module)]
        inside = tuple(f"{layer}." for layer in layers if self.batchnorm == "local")
        return {name for name in self.tracked_state() if name.startswith(inside)}

    def place(self, device: torch.device | str) -> "ChestResNet":
        """Move to a device, channels last; on the CPU layer4 plain: faster, its maps are small."""
        self.to(device, memory_format=torch.channels_last)
        if torch.device(device).type == "cpu":
            self.layer4.to(memory_format=torch.contiguous_format)
        return self

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy named tensors into the model in place, from any device."""
        own = self.state_dict()
        for name, value in state.items():
            own[name].copy_(value)


def is_batchnorm(module: nn.Module) -> bool:
    """Tell BatchNorm by its type, never by its name."""
    return isinstance(module, nn.BatchNorm2d)


def build_resnet34(
    weights: str = "imagenet",
    tracked: str = "layer4,fc",
    batchnorm: str = "average",
    seed: int = 0,
    *,
    outputs: int,
    precision: str = "auto",
    draw_films: Callable[[], np.ndarray] | None = None,
) -> ChestResNet:
    """Build the network (He et al., CVPR 2016): films as stored to logits (B, outputs).

    `weights` is "imagenet", "none" or the path of a state dict in torchvision's format (.pth or
    .safetensors); its head is swapped for a new one drawn from `seed`. Where random weights stay
    frozen, BatchNorm is calibrated once on public films, uint8 (N, H, W), of `draw_films`.
    Raises InputError if the weights cannot be had or do not fit.
    """
    with torch.device("meta"):  # allocates nothing and draws nothing from the global generator
        model = ChestResNet(tracked, batchnorm, outputs, precision)
    draw_weights(model.to_empty(device="cpu"), seed)
    if weights != "none":
        load_trunk(model, weights)
    elif draw_films and ("all" not in model.tracked or batchnorm == "frozen"):
        calibrate_batchnorm(model, [torch.from_numpy(draw_films())[:, None]])
    return model.place("cpu").train()


@torch.no_grad()
def calibrate_batchnorm(model: ChestResNet, batches: Iterable[Tensor], layers: str = "all") -> None:
    """Set BatchNorm's statistics to the mean of those of some batches, as a store holds films.

    `layers` is "all" or "tracked"; all other layers run as in evaluation.
    """
    model.eval()
    named = ((n, m) for n, m in model.named_modules() if is_batchnorm(m))
    chosen = [m for name, m in named if layers == "all" or model.is_tracked(name)]
    momentum = [layer.momentum for layer in chosen]
    for layer in chosen:
        layer.reset_running_stats()
        layer.training, layer.momentum = True, None  # None: the plain average of what is seen
    for batch in batches:
        model(batch)
    for layer, value in zip(chosen, momentum, strict=True):
        layer.momentum = value
