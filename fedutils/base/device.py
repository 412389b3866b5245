"""The machine: devices that replicas live on, the precision they compute in, versions."""

import contextlib
import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import torchvision

from . import __version__
from .errors import InputError
from .files import KAGGLE, PACKAGE, ROOT_MARKER

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_up(threads: int, wanted: str) -> None:
    """Prepare this process for training: threads, repeatable kernels, and memory that is kept.

    On CUDA, cuDNN then takes deterministic algorithms only, so that a run repeats on the same GPU,
    torch and cuDNN; other GPUs round otherwise. Asked for fp32, it multiplies in fp32, not TF32.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = wanted != "fp32"
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Stop glibc from handing freed blocks back to the kernel; False for another C library."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h; older versions allow 32 MB at most.
        return bool(mallopt(-1, 2**31 - 1) and (mallopt(-3, 2**30) or mallopt(-3, 2**25)))
    return False


def find_devices(device: str) -> list[torch.device]:
    """Turn 'auto', 'cpu', 'cuda:0,cuda:1' or 'cpu:0,cpu:0' into a device for each model replica.

    All GPUs are `auto`, without one it is `cpu`: one for each core. Raises InputError for a device
    that is unknown, not there, or too old for the installed torch.
    """
    devices = name_devices(device)
    for found in devices:
        if found.type != "cpu":
            _check_gpu(found)
    return devices


def name_devices(device: str) -> list[torch.device]:
    """Do the same for a list whose GPUs may be those of another machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = [f"cuda:{i}" for i in range(count)] or ["cpu"]
    names = there if device == "auto" else [name.strip() for name in device.split(",")]
    names *= count_cores() if names == ["cpu"] else 1
    try:
        devices = [torch.device(name) for name in names]
    except RuntimeError as error:
        raise InputError(f"device={device!r}: expected auto, cpu, cuda:0 or a list") from error
    if other := [str(found) for found in devices if found.type not in ("cpu", "cuda")]:
        raise InputError(f"device={other[0]!r}: expected cpu or cuda")
    return devices


def count_cores() -> int:
    """Count the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _check_gpu(device: torch.device) -> None:
    """Raise InputError where a device is no GPU that can be used."""
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={str(device)!r} is not there; use device=cpu or auto")
    major, minor = torch.cuda.get_device_capability(device)
    arches = torch.cuda.get_arch_list()
    if str(major) not in {re.sub(r"\D", "", arch)[:-1] for arch in arches}:
        what = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        why = f"not among the GPUs that this torch was built for ({' '.join(arches)})"
        raise InputError(f"{what} is {why}; on Kaggle choose GPU T4 x2")


def precision(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """Return the dtype to compute in: `auto` is the best that a GPU has, float32 on the CPU."""
    if wanted != "auto":
        return PRECISIONS[wanted]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(device: torch.device, wanted: str = "auto") -> torch.autocast:
    """Return the autocast context of a device and a precision; in float32 it changes nothing."""
    dtype = precision(device, wanted)
    # Disabled, it is asked for a dtype that it knows, or it would warn.
    known = torch.bfloat16 if dtype is torch.float32 else dtype
    return torch.autocast(device.type, known, enabled=dtype is not torch.float32)


def environment() -> dict[str, Any]:
    """Return what a run depends on beside its parameters: versions, threads, device, processor."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fedutils": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": ", ".join(gpus) or "CPU",
        "cores": os.cpu_count(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def print_environment() -> None:
    """Print versions and device in one line, and which copy of fedutils this is."""
    about = environment() | {"fedutils": f"{__version__} ({find_copy()})"}
    print(" · ".join(f"{name} {value}" for name, value in about.items()))


def find_copy() -> str:
    """Say where this fedutils lies: beside the notebooks, attached on Kaggle, or installed."""
    if PACKAGE.is_relative_to((KAGGLE / "input").resolve()):
        return f"attached, {PACKAGE}"
    beside = (PACKAGE.parent / ROOT_MARKER).is_file()
    beside |= PACKAGE.parent in (Path.cwd(), *Path.cwd().parents)
    return "beside the notebooks" if beside else "installed"
