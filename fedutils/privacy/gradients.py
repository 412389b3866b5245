"""Patients drawn, their gradients clipped and summed, noise."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.errors import InputError
from ..dataset import AT_ONCE, ChestXrayDataset
from ..model import ChestResNet, is_batchnorm
from .accountant import opacus


class SystemRandomness:
    """The system's randomness in the calls of a NumPy generator that are used here."""

    def random(self, size: int) -> np.ndarray:
        """Draw `size` numbers between 0 and 1."""
        return (np.frombuffer(os.urandom(8 * size), np.uint64) >> 11) * 2.0**-53

    def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> np.ndarray:
        """Draw numbers between two ends, in any shape."""
        return low + (high - low) * self.random(int(np.prod(size))).reshape(size)

    def standard_normal(self, size: int) -> np.ndarray:
        """Draw `size` normal numbers, of four each, which fill the gaps of one's double precision.

        Holohan and Braghin, ESORICS 2021 (arXiv:2107.10138), section 5.1, with n = 2.
        """
        uniform = torch.from_numpy(self.random(4 * size)) + 2.0**-54
        return torch.special.ndtri(uniform).view(4, size).sum(0).div(2).numpy()


def freeze_batchnorm(model: nn.Module) -> dict[str, nn.Parameter]:
    """Freeze the affine parameters of all BatchNorm; return what is trained, by name.

    Raises InputError where a tracked layer has some that is not frozen: it mixes patients.
    """
    layers = [module for module in model.modules() if is_batchnorm(module)]
    if any(layer.training for layer in layers):
        raise InputError("dp=patient wants batchnorm=frozen: BatchNorm mixes patients of a batch")
    for layer in layers:
        layer.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def draw_films(
    patients: list[np.ndarray], rate: float, draw: np.random.Generator | SystemRandomness
) -> np.ndarray:
    """Draw each patient with chance `rate`, on its own, and one film of each; return positions.

    `patients` holds the positions of each one's films. Two numbers are drawn for each patient,
    drawn or not, so that one patient's films never decide about another's.
    """
    chance, which = draw.random(len(patients)), draw.random(len(patients))
    chosen = [films[int(w * len(films))] for films, w in zip(patients, which, strict=True)]
    return np.array(chosen, dtype=int)[chance < rate]


@contextmanager
def per_patient_norms(model: ChestResNet) -> Iterator[nn.Module]:
    """Let Opacus (Yousefpour et al., 2021) measure each film's gradient in float32, neither scaled
    nor rounded; take its hooks off again.
    """
    wanted, model.precision = model.precision, "fp32"
    ghost = opacus("grad_sample").GradSampleModuleFastGradientClipping
    hooked = ghost(model, loss_reduction="sum", use_ghost_clipping=True)
    hooked.NORM_SAMPLERS = hooked.NORM_SAMPLERS | {nn.Conv2d: convolution_norms}
    try:
        yield hooked
    finally:
        hooked.to_standard_module()
        model.precision = wanted


def convolution_norms(
    layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the norm of each film's gradient, (B,), of a convolution without groups or bias.

    Where it has more numbers than its positions have pairs, from their products and without the
    gradient itself (Bu, Mao and Xu, NeurIPS 2022); in float64, as norms that cancel would else be
    taken for smaller ones. Opacus' own takes films for contiguous: of channels_last it makes noise.
    """
    windows = F.unfold(  # (B, in k k, positions)
        activations[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    back = backprops.flatten(2)
    if back.shape[2] ** 2 < layer.weight.numel():
        pairs = [part.double().mT @ part.double() for part in (windows, back)]
        squares = (pairs[0] * pairs[1]).sum((1, 2))
    else:
        squares = (back @ windows.mT).double().square().sum((1, 2))
    return {layer.weight: squares.clamp(min=0).sqrt()}


def clipped_sum(
    hooked: nn.Module,
    films: ChestXrayDataset,
    positions: np.ndarray,
    clip: float,
    motion: np.ndarray | None = None,
) -> list[Tensor]:
    """Sum the gradients of one film a patient, each scaled to a norm of at most `clip`.

    A tensor for each trained parameter, of its shape; films go AT_ONCE. One that is not finite
    counts as zero: an error would tell of the patient, too. `motion`, (3, films), is each film's
    own: augmentation by the place in the batch would let one patient change the gradients of all.
    """
    trained = [p for p in hooked.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in trained]

    def measure(some: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the losses of some of the films, and the norms of their gradients, float64."""
        batch, labels = films.batch(positions[some], sums[0].device)
        losses = patient_losses(hooked(batch, None if motion is None else motion[:, some]), labels)
        losses.sum().backward(retain_graph=True)
        hooked.zero_grad()
        return losses, torch.stack([p._norm_sample.double() for p in trained]).norm(dim=0)

    for start in range(0, len(positions), AT_ONCE):
        some = np.arange(start, min(start + AT_ONCE, len(positions)))
        losses, norms = measure(some)
        finite = norms.isfinite()
        if not finite.all():  # even times zero it would spoil the sum
            losses, norms = measure(some[finite.cpu().numpy()])
        factors = (clip / norms).clamp(max=1).float()
        hooked.disable_hooks()
        parts = torch.autograd.grad(factors @ losses, trained)
        hooked.enable_hooks()
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)]
    return sums


def patient_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each film (B,), mean over its own known labels; (B, k) both.

    Over the batch's known labels, as elsewhere, a patient would change the weight of all others.
    """
    known = (~labels.isnan()).float()
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), labels.nan_to_num(), known, reduction="none"
    )
    return losses.sum(1) / known.sum(1).clamp(min=1)


def add_noise(
    total: Tensor, deviation: float, draw: np.random.Generator | SystemRandomness
) -> Tensor:
    """Add Gaussian noise to a sum, in double precision, then round to a grid; shape and dtype stay.

    A float32 sum with float32 noise has gaps that tell of the sum (Mironov, CCS 2012). Here both
    are added in double precision, where a value comes of either of two sums, and what is released
    is the nearest multiple of the power of two below deviation / 65,536, whatever the sum: rounding
    afterwards costs nothing. This is no discrete Gaussian: the gaps of doubles, 2^-36 of a step of
    the grid or less, remain.
    """
    if not deviation:
        return total
    step = 2.0 ** math.floor(math.log2(deviation) - 16)
    noise = torch.from_numpy(draw.standard_normal(total.numel()) * deviation).view(total.shape)
    released = total.to("cpu", torch.float64) + noise
    return released.div_(step).round_().mul_(step).to(total)
