"""Checkpoints: published layouts are recognised, what is saved comes back, and each mistake has its sentence."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dagan_rt import checkpoints
from dagan_rt.checkpoint_shapes import Shapes, observe
from dagan_rt.checkpoints import Checkpoint, infer_config, inspect, load, save
from dagan_rt.commands import info
from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.networks.model import Model
from dagan_rt.networks.variants import VARIANTS

DEPTH = ("depth_encoder", "depth_decoder")
EXPECTED = {
    "dagan": NetworkConfig(variant="dagan"),
    "dagan_depth50": NetworkConfig(variant="dagan", depth_layers=50),
    "dagan_spade": NetworkConfig(variant="dagan_spade"),
    "fomm": NetworkConfig(variant="fomm", num_keypoints=10),
}


def small(variant: str, **changes: Any) -> NetworkConfig:
    """A config in which no two widths agree by chance, a few thousand parameters small."""
    values: dict[str, Any] = {
        "variant": variant,
        "size": 64,
        "num_keypoints": VARIANTS[variant].num_keypoints,
        "depth_width": 4,
        "depth_decoder_widths": (3, 4, 5, 6, 7),
        "keypoint_width": 6,
        "keypoint_max": 40,
        "keypoint_blocks": 3,
        "motion_width": 5,
        "motion_max": 30,
        "motion_blocks": 4,
        "motion_scale": 0.5,
        "generator_width": 8,
        "generator_max": 28,
        "residual_blocks": 3,
        "query_width": 4,
        "spade_width": 7,
        "spade_hidden": 9,
        "discriminator_width": 5,
        "discriminator_max": 12,
        "discriminator_blocks": 3,
    }
    return NetworkConfig(**(values | changes))


def small_model(variant: str, seed: int = 0, **changes: Any) -> Model:
    torch.manual_seed(seed)
    model = Model(small(variant, **changes))
    for module in model.modules():  # make buffers differ from what a fresh model would have
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.num_batches_tracked.fill_(seed + 3)
    return model


def published(golden: Any, variant: str) -> dict[str, dict[str, torch.Tensor]]:
    """A published file's entries with the right shapes and no memory behind them."""
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    return {
        network: {
            key: torch.zeros((), dtype=dtypes[dtype]).expand(shape)
            for key, (shape, dtype) in entries.items()
            if dtype in dtypes
        }
        for network, entries in golden(variant).keys.items()
    }


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`originals(variant) -> folder` as `save` wrote it; made once, to be copied."""

    @cache
    def write(variant: str, **changes: Any) -> Path:
        model, folder = small_model(variant, **changes), tmp_path_factory.mktemp("original")
        save(folder / "model.pth.tar", model, folder / "depth" if model.depth else None)
        return folder

    return write


@pytest.fixture
def saved(originals: Any, tmp_path: Path) -> Any:
    """`saved(variant) -> (file, depth folder or None)`, for the test to change as it likes."""

    def copy(variant: str, **changes: Any) -> tuple[Path, Path | None]:
        folder = shutil.copytree(originals(variant, **changes), tmp_path / variant)
        return folder / "model.pth.tar", folder / "depth" if VARIANTS[variant].uses_depth else None

    return copy


def tampered(path: Path, change: Any) -> Path:
    """The same file after `change(payload)`, which edits in place."""
    payload = torch.load(path, weights_only=True)
    change(payload)
    torch.save(payload, path)
    return path


def replaced(path: Path, make: Any) -> Path:
    """The same file holding `make(payload)` instead."""
    torch.save(make(torch.load(path, weights_only=True)), path)
    return path


def refusal(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which variant is it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", EXPECTED)
def test_published_shapes_give_the_published_config(golden, variant):
    states = published(golden, variant)
    assert infer_config(states) == EXPECTED[variant]
    shapes = {network: {key: tuple(value.shape) for key, value in state.items()} for network, state in states.items()}
    assert infer_config(shapes) == EXPECTED[variant]  # shapes alone are enough


@pytest.mark.parametrize("variant", EXPECTED)
def test_published_file_passes_inspection(golden, variant, tmp_path):
    states = published(golden, variant)
    depth = None
    if "depth_encoder" in states:
        depth = tmp_path / "depth"
        depth.mkdir()
        side = {"height": 256, "width": 256, "use_stereo": False}
        torch.save(OrderedDict(states["depth_encoder"]) | side, depth / "encoder.pth")
        torch.save(OrderedDict(states["depth_decoder"]), depth / "depth.pth")
    payload: dict[str, Any] = {name: state for name, state in states.items() if name not in DEPTH}
    torch.save(payload | {"epoch": 99, "optimizer_generator": {"state": {}}, "note": "x"}, tmp_path / "c.pth.tar")
    checkpoint = inspect(tmp_path / "c.pth.tar", depth)
    assert checkpoint.config == EXPECTED[variant]
    assert checkpoint.epoch == 99
    assert checkpoint.optimizers == {"generator": {"state": {}}}
    assert "entries not used: note" in checkpoint.notes
    trainable = sum(
        value.numel()
        for key, value in states["generator"].items()
        if not key.endswith(("down.weight", "running_mean", "running_var", "num_batches_tracked", "_u", "_v"))
    )
    assert checkpoint.parameters["generator"] == trainable


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("changes", [{}, {"motion_scale": 1.0}, {"depth_layers": 50, "num_keypoints": 4}])
def test_every_width_is_inferred_from_shapes(variant, changes):
    config = small(variant, **changes)
    with torch.device("meta"):
        states = {name: module.state_dict() for name, module in Model(config).networks().items()}
    inferred = infer_config(states).to_dict()
    unused = {"size"}
    unused |= {"residual_blocks"} if config.parts.decoder == "spade" else {"spade_width", "spade_hidden"}
    unused |= set() if config.parts.attention else {"query_width"}
    unused |= set() if config.parts.uses_depth else {"depth_layers", "depth_width", "depth_decoder_widths"}
    if variant in ("baseline", "fomm") and config.num_keypoints != VARIANTS[variant].num_keypoints:
        unused |= {"variant"}  # the two differ in nothing but the usual number of points
    expected = config.to_dict()
    assert {k: v for k, v in inferred.items() if k not in unused} == {
        k: v for k, v in expected.items() if k not in unused
    }
    assert infer_config(states, declared=config) == config


@pytest.mark.parametrize("scale", [1.0, 0.5, 1 / 3, 0.25, 0.125])
def test_motion_scale_comes_from_the_filter_taps(scale):
    with torch.device("meta"):
        networks = Model(small("fomm", motion_scale=scale)).networks()
    states = {name: module.state_dict() for name, module in networks.items()}
    assert infer_config(states).motion_scale == pytest.approx(scale)


def test_caps_below_the_first_width_are_not_a_contradiction():
    config = small("fomm", generator_max=8, keypoint_max=6, motion_max=5, discriminator_max=4)
    with torch.device("meta"):
        states = {name: module.state_dict() for name, module in Model(config).networks().items()}
    assert infer_config(states, declared=config) == config


def test_unknown_combination_of_parts_is_refused(golden):
    states = published(golden, "dagan")
    states["kp_detector"] = published(golden, "fomm")["kp_detector"]
    states["kp_detector"]["kp.weight"] = torch.zeros(15, 35, 7, 7)
    assert "different variants" in refusal(infer_config, states)


# --- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_then_load_is_the_same_model(variant, tmp_path):
    model = small_model(variant, seed=7)
    depth = tmp_path / "depth" if model.depth else None
    save(tmp_path / "m.pth.tar", model, depth, epoch=12)
    torch.manual_seed(1)
    loaded = load(tmp_path / "m.pth.tar", depth, variant=variant)
    assert loaded.config == model.config
    assert not loaded.training
    expected, got = model.state_dict(), loaded.state_dict()
    assert list(expected) == list(got)
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
    assert inspect(tmp_path / "m.pth.tar", depth).epoch == 12
    files = {"m.pth.tar"} | ({"depth"} if depth else set())
    assert {entry.name for entry in tmp_path.iterdir()} == files


def test_file_layout_is_the_published_one(saved, golden, tmp_path):
    path, depth = saved("dagan")
    payload = torch.load(path, weights_only=True)
    assert list(payload) == ["generator", "kp_detector", "discriminator", "epoch", "config"]
    keys = golden("dagan").keys
    encoder = torch.load(depth / "encoder.pth", weights_only=True)
    classifier = {"encoder.fc.weight", "encoder.fc.bias"}
    assert set(encoder) - {"height", "width", "use_stereo"} == set(keys["depth_encoder"]) - classifier - {
        "height",
        "width",
        "use_stereo",
    }
    assert set(torch.load(depth / "depth.pth", weights_only=True)) == set(keys["depth_decoder"])
    assert set(payload["discriminator"]) <= set(keys["discriminator"])


def test_optimizers_and_extra_entries_come_back(tmp_path):
    model = small_model("fomm")
    optimizer = torch.optim.Adam(model.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for parameter in model.generator.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save(tmp_path / "m.pth.tar", model, optimizers={"generator": optimizer}, epoch=3, extra={"seed": [1, 2]})
    checkpoint = inspect(tmp_path / "m.pth.tar")
    assert checkpoint.extra == {"seed": [1, 2]}
    state = checkpoint.optimizers["generator"]
    assert state["param_groups"][0]["betas"] == (0.5, 0.999)
    assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_module_prefixes_are_stripped(saved):
    path, depth = saved("dagan_spade")
    expected = load(path, depth).state_dict()

    def wrap(payload):
        payload["generator"] = {f"module.{key}": value for key, value in payload["generator"].items()}
        payload["kp_detector"] = {f"module.module.{key}": value for key, value in payload["kp_detector"].items()}
        payload["discriminator"] = {
            key.replace("discs.1.", "discs.1.module."): value for key, value in payload["discriminator"].items()
        }

    tampered(path, wrap)
    replaced(depth / "encoder.pth", lambda state: {f"module.{key}": value for key, value in state.items()})
    got = load(path, depth).state_dict()
    assert all(torch.equal(value, got[key]) for key, value in expected.items())
    assert any("module." in note for note in inspect(path, depth).notes)


def test_files_of_the_old_format_are_read(saved):
    path, _ = saved("fomm")
    expected = load(path).state_dict()
    payload = torch.load(path, weights_only=True)
    for network in ("generator", "kp_detector"):  # PyTorch 0.4 did not count batches
        for key in [key for key in payload[network] if key.endswith("num_batches_tracked")]:
            del payload[network][key]
    torch.save(payload, path, _use_new_zipfile_serialization=False)
    got = load(path).state_dict()
    assert all(torch.equal(v, got[k]) for k, v in expected.items() if not k.endswith("num_batches_tracked"))


def test_half_precision_weights_become_float32(saved):
    path, _ = saved("fomm")
    tampered(path, lambda p: p.update(generator={k: v.half() if v.ndim else v for k, v in p["generator"].items()}))
    assert load(path).generator.final.weight.dtype == torch.float32
    assert any("float16" in note for note in inspect(path).notes)


def test_size_and_unreached_caps_come_from_the_files_own_config(saved):
    path, _ = saved("fomm", size=96, generator_max=4000)
    assert (load(path).config.size, load(path).config.generator_max) == (96, 4000)
    tampered(path, lambda payload: payload.pop("config"))
    checkpoint = inspect(path)
    assert (checkpoint.config.size, checkpoint.config.generator_max) == (256, 512)
    assert any("256 × 256 assumed" in note for note in checkpoint.notes)


def test_fomm_and_baseline_are_told_apart_by_config_then_by_points(saved):
    path, _ = saved("baseline", num_keypoints=10)
    assert inspect(path).config.variant == "baseline"
    tampered(path, lambda payload: payload.pop("config"))
    checkpoint = inspect(path)
    assert checkpoint.config.variant == "fomm"
    assert any("fomm from its 10 key points" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_keypoints", 9), ("motion_scale", 0.25), ("generator_width", 9), ("generator_max", 20), ("variant", "dagan")],
)
def test_config_that_contradicts_the_weights_is_refused(saved, name, value):
    path, _ = saved("fomm")
    message = refusal(inspect, tampered(path, lambda payload: payload["config"].update({name: value})))
    assert "its config says" in message and str(value) in message and str(path) in message


def test_config_with_foreign_or_malformed_values(saved):
    path, _ = saved("fomm")
    tampered(path, lambda payload: payload.update(config={"lr": 1.0}))  # another program's entry of the same name
    assert inspect(path).config.size == 256
    tampered(path, lambda payload: payload.update(config={"variant": "fomm", "size": "big"}))
    assert "'size' must be int" in refusal(inspect, path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 10**9),
        ("discriminator_blocks", 10**6),
        ("discriminator_width", -1),
        ("motion_scale", 0.0),
        ("motion_scale", float("nan")),
        ("depth_decoder_widths", [1, 2]),
        ("depth_decoder_widths", [1, 2, 3, 4, "x"]),
    ],
)
def test_config_that_would_build_nonsense_is_refused(saved, name, value):
    path, _ = saved("dagan")
    tampered(path, lambda payload: payload.pop("discriminator"))  # no shape there to contradict it
    assert name in refusal(inspect, tampered(path, lambda payload: payload["config"].update({name: value})))


# --- the depth folder ----------------------------------------------------------------------------------------------


def test_missing_depth_folder_names_the_candidates(saved, tmp_path):
    path, depth = saved("dagan")
    assert inspect(path).missing_depth  # looking at it is fine
    message = refusal(load, path)
    assert "needs its depth network" in message and str(depth) in message
    depth.rename(tmp_path / "elsewhere")
    assert "beside" not in refusal(load, path)


def test_depth_folder_for_a_variant_without_depth_is_a_note(saved):
    path, _ = saved("fomm")
    _, depth = saved("dagan")
    assert any("fomm has no depth network" in note for note in inspect(path, depth).notes)
    load(path, depth)


def test_swapped_depth_files(saved):
    path, depth = saved("dagan")
    (depth / "encoder.pth").rename(depth / "x")
    (depth / "depth.pth").rename(depth / "encoder.pth")
    (depth / "x").rename(depth / "depth.pth")
    assert "swap their names" in refusal(load, path, depth)


@pytest.mark.parametrize("absent", ["encoder.pth", "depth.pth"])
def test_one_depth_file_missing(saved, absent):
    path, depth = saved("dagan")
    (depth / absent).unlink()
    assert f"no {absent}" in refusal(load, path, depth)


def test_same_half_twice_or_a_generator_as_depth(saved):
    path, depth = saved("dagan")
    encoder = (depth / "encoder.pth").read_bytes()
    (depth / "depth.pth").write_bytes(encoder)
    assert "must hold the depth decoder, got a depth encoder" in refusal(load, path, depth)
    torch.save(torch.load(path, weights_only=True)["generator"], depth / "encoder.pth")
    assert "must hold the depth encoder, got a generator" in refusal(load, path, depth)


def test_depth_path_is_a_file_missing_or_another_folder(saved, tmp_path):
    path, depth = saved("dagan")
    assert f"give {depth}" in refusal(load, path, depth / "encoder.pth")
    assert "must be the folder" in refusal(load, path, path)
    assert "does not exist" in refusal(load, path, tmp_path / "nothing")
    assert "it holds depth, model.pth.tar" in refusal(load, path, path.parent)


def test_encoder_and_decoder_of_different_networks(saved, tmp_path):
    path, depth = saved("dagan")
    save(tmp_path / "m50.pth.tar", small_model("dagan", depth_layers=50), tmp_path / "depth50")
    (tmp_path / "depth50" / "depth.pth").replace(depth / "depth.pth")
    message = refusal(load, path, depth)
    assert "ResNet-18 that gives 32 channels but the depth decoder expects 128" in message


def test_depth_network_of_another_kind(golden):
    states = published(golden, "dagan")
    pose = dict(states["depth_encoder"], **{"encoder.conv1.weight": torch.zeros(64, 6, 7, 7)})
    assert "pose encoder" in refusal(infer_config, states | {"depth_encoder": pose})
    deeper = dict(states["depth_encoder"], **{"encoder.layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)})
    assert "must be a ResNet-18 or ResNet-50" in refusal(infer_config, states | {"depth_encoder": deeper})


def test_depth_network_other_than_the_declared_one(saved, tmp_path):
    path, _ = saved("dagan")
    save(tmp_path / "m50.pth.tar", small_model("dagan", depth_layers=50), tmp_path / "depth50")
    assert "depth_layers = 18 but the weights have 50" in refusal(load, path, tmp_path / "depth50")


# --- parts that do not belong together -----------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "asked"), [("dagan_spade", "dagan"), ("dagan", "dagan_spade"), ("fomm", "dagan")])
def test_another_variant_than_asked_for(saved, held, asked):
    path, depth = saved(held)
    message = refusal(load, path, depth, variant=asked)
    assert f"checkpoint is {held}" in message and f"you asked for {asked}" in message
    if depth:
        assert "you asked for" in refusal(load, path, variant=asked)  # before it complains of depth


def test_generator_and_key_points_of_different_counts(saved):
    path, _ = saved("fomm")
    other, _ = saved("baseline")
    kp_detector = torch.load(other, weights_only=True)["kp_detector"]
    message = refusal(load, tampered(path, lambda payload: payload.update(kp_detector=kp_detector)))
    assert "generator is for 10 key points but kp_detector finds 15" in message


def test_networks_that_shrink_differently(saved):
    path, _ = saved("fomm")
    other = small_model("fomm", motion_scale=0.25).keypoints.state_dict()
    assert "shrinks its input" in refusal(load, tampered(path, lambda payload: payload.update(kp_detector=other)))


def test_networks_under_each_others_names(saved):
    path, _ = saved("fomm")

    def swap(payload):
        payload["generator"], payload["kp_detector"] = payload["kp_detector"], payload["generator"]

    assert "under 'generator' it holds the state dict of a kp_detector" in refusal(load, tampered(path, swap))


def test_only_what_training_needs(saved):
    path, _ = saved("fomm")
    message = refusal(load, replaced(path, lambda p: {"discriminator": p["discriminator"], "optimizer_generator": {}}))
    assert "holds only what training needs" in message
    assert "holds only what training needs" in refusal(load, replaced(path, lambda p: {"optimizer_generator": {}}))


@pytest.mark.parametrize(("kept", "absent"), [("generator", "kp_detector"), ("kp_detector", "generator")])
def test_half_a_checkpoint(saved, kept, absent):
    path, _ = saved("fomm")
    assert f"no {absent}" in refusal(load, replaced(path, lambda payload: {kept: payload[kept]}))


@pytest.mark.parametrize("file", ["encoder.pth", "depth.pth"])
def test_depth_file_given_as_the_checkpoint(saved, file):
    _, depth = saved("dagan")
    half = {"encoder.pth": "encoder", "depth.pth": "decoder"}[file]
    assert f"is the {half} half of a depth network" in refusal(load, depth / file)


@pytest.mark.parametrize("network", ["generator", "kp_detector", "discriminator"])
def test_bare_state_dict(saved, network):
    path, _ = saved("dagan_spade")
    message = refusal(load, replaced(path, lambda payload: payload[network]))
    assert f"is the state dict of a {network} alone" in message


@pytest.mark.parametrize("payload", [{}, [1, 2], torch.zeros(3), {"a": torch.zeros(1)}, {1: 2}])
def test_torch_files_that_are_no_checkpoints(tmp_path, payload):
    torch.save(payload, tmp_path / "x.pth")
    assert "generator" in (message := refusal(load, tmp_path / "x.pth")) or "state dicts" in message


def test_discriminator_of_another_design_does_not_stand_in_the_way(saved):
    path, _ = saved("fomm")
    tampered(path, lambda p: p["discriminator"].update({"discs.1.down_blocks.0.conv.weight": torch.zeros(10, 3, 4, 4)}))
    assert "discriminator" not in inspect(path).state_dicts
    assert any("discriminator left out" in note for note in inspect(path).notes)
    load(path)
    tampered(path, lambda payload: payload.pop("discriminator"))
    assert any("no discriminator" in note for note in inspect(path).notes)


# --- entries -------------------------------------------------------------------------------------------------------


def test_missing_entries_are_listed(saved):
    path, _ = saved("fomm")

    def thin(payload):
        for key in [key for key in payload["generator"] if key.startswith("bottleneck.r1.")]:
            del payload["generator"][key]
        payload["generator"]["bottleneck.r1.x"] = torch.zeros(1)

    message = refusal(load, tampered(path, thin))
    assert "generator lacks 12 of" in message and "bottleneck.r1.conv1.weight, " in message and "(12 in all)" in message


def test_missing_entry_that_tells_a_width(saved):
    path, _ = saved("fomm")
    message = refusal(load, tampered(path, lambda payload: payload["generator"].pop("first.conv.weight")))
    assert "generator has no entry first.conv.weight" in message


def test_unknown_entries_are_listed(saved):
    path, _ = saved("fomm")
    message = refusal(load, tampered(path, lambda payload: payload["generator"].update(surplus=torch.zeros(1))))
    assert "1 entries that this network does not know: surplus" in message


def test_wrong_shape_is_named(saved):
    path, _ = saved("fomm")
    tampered(path, lambda payload: payload["generator"].update({"final.weight": torch.zeros(3, 8, 5, 5)}))
    assert "generator entry final.weight must be [3, 8, 7, 7], got [3, 8, 5, 5]" in refusal(load, path)
    tampered(path, lambda payload: payload["generator"].update({"first.conv.weight": torch.zeros(3)}))
    assert "must be a convolution [out, in, h, w], got [3]" in refusal(load, path)


@pytest.mark.parametrize(
    "value", [3, torch.zeros(8).to_sparse(), torch.zeros(8, device="meta")], ids=["int", "sparse", "meta"]
)
def test_entry_that_is_no_dense_tensor(saved, value):
    path, _ = saved("fomm")
    message = refusal(load, tampered(path, lambda payload: payload["generator"].update({"first.norm.bias": value})))
    assert "generator entry first.norm.bias must be a" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights(saved, value):
    path, _ = saved("fomm")
    tampered(path, lambda payload: payload["generator"]["final.bias"].fill_(value))
    assert "NaN or infinite values, the first is generator final.bias" in refusal(load, path)
    assert "generator final.bias" in info.describe(inspect(path))


def test_forged_shapes_cost_no_memory(saved):
    path, _ = saved("fomm")
    vast = torch.zeros(1).expand(60000, 60000, 3, 3)
    key = "bottleneck.r0.conv1.weight"
    assert f"entry {key} must be [28, 28, 3, 3]" in refusal(
        load, tampered(path, lambda payload: payload["generator"].update({key: vast}))
    )
    for width, limit in ((60000, "generator_width must be from 1 to 1024"), (1024, "parameters, more than")):
        for key, out in (("first.conv.weight", width), ("down_blocks.1.conv.weight", 4 * width)):
            forged = torch.zeros(1).expand(out, out, 3, 3)
            tampered(path, lambda payload, key=key, forged=forged: payload["generator"].update({key: forged}))
        assert limit in refusal(load, tampered(path, lambda payload: payload.pop("config", None)))


# --- files that are something else ---------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth.tar"
    torch.save({"generator": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
    message = refusal(load, path)
    assert f"{os.system.__module__}.system" in message and "nothing was run" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is what it claims to be: unsafe reading does run it
    assert marker.exists()


def test_code_in_a_bare_pickle_or_a_depth_file_never_runs(saved, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    refusal(load, tmp_path / "bare.pth")
    path, depth = saved("dagan")
    torch.save({"encoder.conv1.weight": Malicious(marker)}, depth / "encoder.pth")
    assert "encoder.pth asks for the Python object" in refusal(load, path, depth)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_file_cut_short(saved, kept, zipped):
    path, _ = saved("fomm")
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "cut short at" in refusal(load, path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html><body>quota exceeded</body></html>", "is an HTML page"),
        (b"\n  <html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "is a JPEG image"),
        (b"\x00\x00\x00\x20ftypisom" + bytes(40), "is an image or video"),
        ((60).to_bytes(8, "little") + b'{"weight":{"dtype":"F32"}}', "is a safetensors file"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(40), "is an ONNX graph"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"hello world, this is a README\n", "is a text file"),
        (bytes(range(1, 200)), "is not a PyTorch checkpoint"),
        (bytes(600), "is not a PyTorch checkpoint"),
        (b"\x80\x02}q\x00.", "cut short"),
        (b"\x80", "cut short"),
    ],
)
def test_what_the_file_looks_like(tmp_path, content, sentence):
    path = tmp_path / "model.pth.tar"
    path.write_bytes(content)
    message = refusal(load, path)
    assert sentence in message and str(path) in message


def test_real_foreign_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), tmp_path / "renamed.pth")
    assert "is an ONNX graph" in refusal(load, tmp_path / "renamed.pth")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "script.pth")
    assert "TorchScript" in refusal(load, tmp_path / "script.pth")
    import tarfile
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("weights/readme.txt", "x")
    assert "is a zip archive" in refusal(load, tmp_path / "a.zip")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.zip", "a.zip")
    assert "is a real tar archive" in refusal(load, tmp_path / "a.tar")


def test_compressed_zip_is_refused_before_it_is_unpacked(saved, tmp_path):
    import zipfile

    path, _ = saved("fomm")
    tampered(path, lambda payload: payload.update(padding=torch.zeros(100_000)))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "compressed zip" in refusal(load, tmp_path / "z.pth")


def test_paths_that_are_no_files(saved, tmp_path):
    path, depth = saved("dagan")
    assert "does not exist" in refusal(load, tmp_path / "nothing.pth")
    assert "is a folder" in refusal(load, path.parent)
    assert "depth network's folder" in refusal(load, depth)
    (tmp_path / "manifest.json").write_text("{}")
    assert "exported bundle" in refusal(load, tmp_path)


# --- writing whole files or nothing --------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file through resource")
def test_full_disk_leaves_the_old_files_and_nothing_else(saved, tmp_path):
    import resource
    import signal

    path, depth = saved("dagan")
    before = tree(tmp_path)
    largest = max(len(content) for content in before.values())
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 4096, old_limit[1]))  # the depth files fit, the last does not
    try:
        message = refusal(save, path, small_model("dagan", seed=5), depth)
        refusal(save, tmp_path / "new" / "m.pth.tar", small_model("dagan", seed=5), tmp_path / "new" / "depth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert "could not be written, nothing was changed: File too large" in message
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(payload, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "m.pth.tar", small_model("fomm"))
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    message = refusal(save, tmp_path / "m.pth.tar", small_model("fomm"), extra={"when": Path("x")})
    assert "plain values only" in message and "pathlib" in message
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_has_no_place(tmp_path):
    assert "no depth network" in refusal(save, tmp_path / "m.pth.tar", small_model("fomm"), tmp_path / "depth")
    assert "already the name" in refusal(save, tmp_path / "m.pth.tar", small_model("fomm"), extra={"epoch": 3})


# --- dagan-rt info -------------------------------------------------------------------------------------------------


def run_info(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    info.add_parser(parser.add_subparsers())
    args = parser.parse_args(["info", *arguments])
    return args.run(args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_info_prints_the_table(saved, variant, capsys):
    path, depth = saved(variant)
    assert run_info(str(path), *(["--depth", str(depth)] if depth else [])) == 0
    printed = capsys.readouterr().out
    for expected in (variant, "64 × 64", "key points", "8 → 16 → 28 channels", "generator", "kp_detector", "epoch"):
        assert expected in printed
    assert ("ResNet-18" in printed) == (depth is not None)


def test_info_without_depth_says_so(saved, capsys):
    path, _ = saved("dagan")
    assert run_info(str(path)) == 0
    printed = capsys.readouterr().out
    assert "not given (--depth DIR)" in printed and "note: no depth folder given" in printed


def test_info_of_a_bundle_prints_its_manifest(tmp_path, monkeypatch, capsys):
    bundle = pytest.importorskip("dagan_rt.bundle")
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(bundle.Bundle, "open", lambda path: path)
    monkeypatch.setattr(bundle, "describe", lambda opened: f"bundle {opened}")
    monkeypatch.setattr(info, "describe_backends", lambda opened: f"backends for {opened}")
    assert run_info(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"bundle {tmp_path}\n\nbackends for {tmp_path}\n"
    assert "brings its own" in refusal(run_info, str(tmp_path), "--depth", str(tmp_path))


@pytest.mark.slow
def test_full_size_file_loads_strictly(golden, tmp_path):
    model = golden("dagan").model()
    save(tmp_path / "m.pth.tar", model, tmp_path / "depth")
    checkpoint: Checkpoint = inspect(tmp_path / "m.pth.tar", tmp_path / "depth")
    got = checkpoint.build().state_dict()
    assert all(torch.equal(value, got[key]) for key, value in model.state_dict().items())


def test_observation_needs_no_tensors():
    """The tables of the golden files are lists; so may anybody's be."""
    with pytest.raises(InputError, match="kp_detector has no entry predictor"):
        observe({name: Shapes(name, {"kp.weight": [1, 2, 3, 4]}) for name in ("generator", "kp_detector")})
