"""Which devices are used, and in which precision; no GPU is needed to know."""

import pytest
import torch
from tiny import fake_gpus

from fedutils.device import autocast, find_devices, precision
from fedutils.findings import InputError

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
