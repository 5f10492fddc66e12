"""VGG-19: its layout, its weights file, and what it refuses. Its numbers are part of the golden perceptual loss."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch

from dagan_rt.errors import InputError
from dagan_rt.training.vgg import Vgg19, load_vgg

# Simonyan and Zisserman, table 1, configuration E, up to relu5_1: channels of each convolution, M = max pool.
CONFIGURATION_E = [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512]


def published_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    index, channels = 0, 3
    for entry in CONFIGURATION_E:
        if entry == "M":
            index += 1
            continue
        assert isinstance(entry, int)
        shapes[f"features.{index}.weight"] = (entry, channels, 3, 3)
        shapes[f"features.{index}.bias"] = (entry,)
        index, channels = index + 2, entry  # a ReLU follows
    return shapes


def test_parameters_have_torchvision_names_and_shapes():
    assert {name: tuple(value.shape) for name, value in Vgg19().state_dict().items()} == published_shapes()


def test_features_halve_in_size_and_carry_no_parameter_gradient():
    network = load_vgg(width=0.125)
    image = torch.rand(1, 3, 48, 32, requires_grad=True)
    features = network(image)
    assert [tuple(f.shape[1:]) for f in features] == [(8, 48, 32), (16, 24, 16), (32, 12, 8), (64, 6, 4), (64, 3, 2)]
    sum(f.sum() for f in features).backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_random_weights_are_said_aloud_and_follow_the_seed(caplog):
    with caplog.at_level(logging.WARNING):
        first = load_vgg(width=0.1, seed=4).state_dict()
    assert "random" in caplog.text and "seed 4" in caplog.text
    again, other = load_vgg(width=0.1, seed=4).state_dict(), load_vgg(width=0.1, seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_a_torchvision_file_loads_and_its_later_layers_are_ignored(tmp_path, caplog):
    state = {name: torch.full(shape, 0.01) for name, shape in published_shapes().items()}
    later = {"features.30.weight": torch.zeros(512), "classifier.0.bias": torch.zeros(1)}
    torch.save(state | later, tmp_path / "v.pth")
    loaded = load_vgg(tmp_path / "v.pth").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert not caplog.records


def test_unusable_files_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_vgg(tmp_path / "absent.pth")
    torch.save({"features.0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "slim.pth")
    with pytest.raises(InputError, match=r"features.0.weight of shape \(64, 3, 3, 3\), got \(32, 3, 3, 3\)"):
        load_vgg(tmp_path / "slim.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(InputError, match="got nothing"):
        load_vgg(tmp_path / "empty.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(RunsCode(), protocol=2))
    with pytest.raises(InputError, match="without running code"):
        load_vgg(tmp_path / "code.pth")
    with pytest.raises(InputError, match="width"):
        load_vgg(tmp_path / "slim.pth", width=0.5)
    with pytest.raises(InputError, match="width"):
        Vgg19(width=0)


class RunsCode:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_tiny_images_are_refused():
    with pytest.raises(ValueError, match="16 x 16"):
        load_vgg(width=0.1)(torch.zeros(1, 3, 8, 8))
