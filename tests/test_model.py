"""The network: head swap, tracked layers, frozen trunk, real weight files."""

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from fedutils.base.errors import InputError
from fedutils.base.weights import find_weights
from fedutils.dataset import normalise
from fedutils.films.phantom.write import draw_batch
from fedutils.model import build_resnet34, is_batchnorm


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A file in torchvision's own format, as old as the real one: no BatchNorm counters."""
    torch.manual_seed(0)
    state = torchvision.models.resnet34(weights=None).state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("weights") / "resnet34-b627a593.pth"
    torch.save(state, path)
    return path, state


def test_head_has_14_outputs_and_layer4_and_fc_are_tracked(imagenet):
    model = build_resnet34(str(imagenet[0]), outputs=14)
    assert model.fc.out_features == 14
    state = model.tracked_state()
    assert {name.split(".")[0] for name in state} == {"layer4", "fc"}
    assert sum(p.numel() for p in model.parameters()) == 21_291_854
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 13_121_550
    buffers = [v for k, v in state.items() if "running" in k]
    assert sum(v.numel() for v in buffers) == 7_168


def test_weights_are_loaded_but_for_the_head(imagenet):
    path, state = imagenet
    model = build_resnet34(str(path), outputs=14).state_dict()
    for name, value in state.items():
        assert name.startswith("fc.") or torch.equal(model[name], value), name


def test_state_dict_loads_into_plain_torchvision(imagenet):
    model = build_resnet34(str(imagenet[0]), outputs=14).double().eval()
    plain = torchvision.models.resnet34(num_classes=14).double().eval()
    plain.load_state_dict(model.state_dict())
    films = normalise(torch.from_numpy(draw_batch(2, 64))[:, None]).double()
    assert torch.allclose(plain(films), model(films), rtol=0, atol=1e-9)  # of logits up to 20


def test_on_the_cpu_only_layer4_lies_plain(imagenet):
    for name, parameter in build_resnet34(str(imagenet[0]), outputs=14).named_parameters():
        layout = torch.contiguous_format if name.startswith("layer4.") else torch.channels_last
        assert parameter.ndim < 4 or parameter.is_contiguous(memory_format=layout), name


def test_safetensors_weights_load_too(imagenet, tmp_path):
    save_file(imagenet[1], tmp_path / "w.safetensors")
    model = build_resnet34(str(tmp_path / "w.safetensors"), outputs=14)
    assert torch.equal(model.conv1.weight, imagenet[1]["conv1.weight"])


def test_attached_file_is_found_without_the_network(imagenet, tmp_path, monkeypatch):
    folder = tmp_path / "input" / "datasets" / "someone" / "resnet34"
    folder.mkdir(parents=True)
    attached = folder / "resnet34-b627a593.pth"
    attached.write_bytes(imagenet[0].read_bytes())
    monkeypatch.setattr("fedutils.base.weights.KAGGLE_INPUT", tmp_path / "input")
    assert find_weights("imagenet") == attached
    assert torch.equal(
        build_resnet34("imagenet", outputs=14).conv1.weight, imagenet[1]["conv1.weight"]
    )


def test_without_file_and_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("fedutils.base.weights.KAGGLE_INPUT", tmp_path)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match=r"no route to host.*weights=PATH.*weights=none"):
        build_resnet34("imagenet", outputs=14)
    with pytest.raises(InputError, match="no such file"):
        build_resnet34(str(tmp_path / "missing.pth"), outputs=14)


def test_a_foreign_state_dict_is_refused_by_name(tmp_path):
    torch.save({"layer9.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no ResNet-34 state dict"):
        build_resnet34(str(tmp_path / "w.pth"), outputs=14)
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not a real file")
    with pytest.raises(InputError, match="cannot be read"):
        build_resnet34(str(tmp_path / "broken.pth"), outputs=14)


def test_a_pickle_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError):
        build_resnet34(str(tmp_path / "evil.pth"), outputs=14)
    assert not (tmp_path / "owned").exists()


def test_train_leaves_the_trunk_in_eval_mode():
    model = build_resnet34("none", "layer4,fc", outputs=14)
    model.train()
    modes = {name: m.training for name, m in model.named_modules() if is_batchnorm(m)}
    assert not any(mode for name, mode in modes.items() if not name.startswith("layer4."))
    assert all(mode for name, mode in modes.items() if name.startswith("layer4."))
    assert not model.layer3.training and model.layer4.training and not model.eval().layer4.training


def test_batchnorm_is_told_by_type_downsample_included():
    names = build_resnet34("none", "layer4,fc", "local", outputs=14).local_names()
    assert "layer4.0.downsample.1.running_mean" in names and "layer4.0.bn1.bias" in names
    assert "layer4.0.downsample.0.weight" not in names and len(names) == 7 * 5
    assert build_resnet34("none", "layer4,fc", "average", outputs=14).local_names() == set()


def test_tracked_layers_are_matched_with_the_dot():
    model = build_resnet34("none", "layer1", outputs=14)
    assert model.is_tracked("layer1.0.conv1.weight") and not model.is_tracked("layer10.weight")
    with pytest.raises(InputError, match=r"tracked='layer5'.*layer4"):
        build_resnet34("none", "layer5", outputs=14)


def test_weights_come_from_the_seed_alone():
    first = build_resnet34("none", "all", seed=1, outputs=14).state_dict()
    torch.rand(5)
    again = build_resnet34("none", "all", seed=1, outputs=14).state_dict()
    other = build_resnet34("none", "all", seed=2, outputs=14).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_resnet34("none", "layer4,fc", outputs=14)
    assert torch.equal(torch.rand(3), expected)


def test_a_random_frozen_trunk_has_calibrated_batchnorm():
    model = build_resnet34(
        "none", "layer4,fc", draw_films=lambda: draw_batch(32, 64), outputs=14
    ).eval()
    features = {}
    model.layer3.register_forward_hook(lambda m, i, o: features.update(out=o))
    model(normalise(torch.from_numpy(draw_batch(16, 64, seed=1))[:, None]))
    assert 0.05 < features["out"].std() < 20
    assert not np.allclose(model.bn1.running_var, 1)
