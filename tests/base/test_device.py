"""Which devices are used, and in which precision; no GPU is needed to know."""

import platform
import subprocess
import sys

import pytest
import torch
from tiny import fake_gpus

from fedutils.base.device import autocast, find_devices, precision, set_up
from fedutils.base.errors import InputError

CPU = torch.device("cpu")


def test_auto_uses_every_gpu(monkeypatch):
    fake_gpus(monkeypatch, 2)
    assert [str(device) for device in find_devices("auto")] == ["cuda:0", "cuda:1"]
    assert precision(torch.device("cuda:0")) is torch.float16
    with pytest.raises(InputError, match="'cuda:2' is not there"):
        find_devices("cuda:2")


def test_a_gpu_that_torch_has_no_code_for_is_named_with_the_way_out(monkeypatch):
    fake_gpus(monkeypatch, 1, capability=(6, 0))
    with pytest.raises(InputError, match=r"Tesla P100 \(sm_60\).*choose GPU T4 x2"):
        find_devices("auto")


def test_bfloat16_where_it_is_native_and_float32_on_the_cpu(monkeypatch):
    fake_gpus(monkeypatch, 1, capability=(9, 0), arches=("sm_90a",))
    assert precision(find_devices("auto")[0]) is torch.bfloat16
    assert precision(torch.device("cpu")) is torch.float32


def test_a_wanted_precision_wins(monkeypatch):
    fake_gpus(monkeypatch, 1)
    assert precision(torch.device("cuda:0"), "fp32") is torch.float32
    assert precision(CPU, "bf16") is torch.bfloat16 and precision(CPU, "fp16") is torch.float16


@pytest.mark.parametrize(
    ("wanted", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_autocast_computes_in_that_precision_on_the_cpu(wanted, dtype, recwarn):
    with autocast(CPU, wanted):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert not recwarn


def test_training_is_set_up_to_repeat_and_fp32_is_not_tf32():
    for wanted, tf32 in (("auto", True), ("fp32", False)):
        set_up(1, wanted)
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == 1


FAULTS = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault
from fedutils.base.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for i in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt if i == 10 else before if i else 0
    torch.ones(10_000_000)  # 40 MB, freed at once
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults / (20 * 40_000_000 / resource.getpagesize()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step():
    command = [sys.executable, "-c", FAULTS]
    faults = {
        how: float(subprocess.run([*command, how], capture_output=True, check=True).stdout)
        for how in ("keep", "give")
    }
    assert faults["keep"] < 0.01 and faults["give"] > 0.9, "of the pages of 20 tensors"
