"""The whole way, published files -> export -> Reenactor, against images that the published implementation made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dagan_rt import Reenactor, checkpoints
from dagan_rt.backends import open_backend
from dagan_rt.bundle import Bundle
from dagan_rt.export import export
from dagan_rt.images import write_image

VARIANTS = ["fomm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dagan", "dagan_depth50", "dagan_spade"))]
SESSIONS = {
    "absolute": {"motion": "absolute"},
    "relative": {"motion": "relative"},
    "adapted": {"motion": "relative", "adapt_scale": True},
}


def write_published_files(golden: Any, folder: Path) -> tuple[Path, Path | None]:
    """The checkpoint and the depth folder as they are published, classifier and plain numbers included."""
    networks = {name: network.state_dict() for name, network in golden.model().networks().items()}
    torch.save({name: networks[name] for name in ("generator", "kp_detector")} | {"epoch": 1}, folder / "model.pth.tar")
    if "depth_encoder" not in networks:
        return folder / "model.pth.tar", None
    (folder / "depth").mkdir()
    whole = {**golden.state_dict("depth_encoder"), "height": 256, "width": 256, "use_stereo": False}
    torch.save(whole, folder / "depth" / "encoder.pth")
    torch.save(networks["depth_decoder"], folder / "depth" / "depth.pth")
    return folder / "model.pth.tar", folder / "depth"


@pytest.mark.slow
def test_the_full_size_in_fp16_keeps_45_db_in_6_gb(golden: Any, tmp_path: Path) -> None:
    checkpoint, depth = write_published_files(golden("dagan"), tmp_path)
    arguments = ["--checkpoint", str(checkpoint), "--depth", str(depth), "--out", str(tmp_path / "bundle")]
    options = ["--precision", "fp16", "--no-torch-weights"]
    process = subprocess.Popen([sys.executable, "-m", "dagan_rt.export", *arguments, *options])
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss < 6e6  # kB
    reenactment = Bundle.open(tmp_path / "bundle").report.reenactment
    assert min(reenactment[backend].psnr for backend in ("onnxruntime", "fp16 rounding")) >= 45


@pytest.fixture(scope="module", params=VARIANTS)
def published(request: pytest.FixtureRequest, golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(arrays of the golden file, bundle exported from published files, what the export measured)."""
    reference, folder = golden(request.param), tmp_path_factory.mktemp(request.param)
    model = checkpoints.load(*write_published_files(reference, folder))
    faces = [reference.arrays["source"], *reference.arrays["driving"]]
    images = [folder / f"{number}.png" for number in range(len(faces))]
    for path, face in zip(images, faces, strict=True):
        write_image(path, face)
    bundle, measured = export(model, folder / "bundle", images=images)
    return reference.arrays, bundle, measured


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_sessions_reproduce_the_published_images(published: Any, backend: str) -> None:
    arrays, bundle, _ = published
    opened = open_backend(backend, bundle, torch.get_num_threads())
    for name, options in SESSIONS.items():
        if f"frame2_{name}_prediction" not in arrays:
            continue
        reenactor = Reenactor(bundle, opened, **options)
        reenactor.set_source(arrays["source"])
        for number in (2,) if name == "absolute" else (0, 2):
            result = reenactor.drive(arrays["driving"][number])
            if f"frame{number}_{name}_prediction" in arrays:
                stored = result.transpose(2, 0, 1)[None, :, ::4, ::4].astype(np.float64) / 255
                assert np.abs(stored - arrays[f"frame{number}_{name}_prediction"]).max() <= 1 / 255, (name, number)


def test_the_bundle_says_what_was_exported_and_measured(published: Any) -> None:
    arrays, bundle, measured = published
    again = Bundle.open(bundle.path)
    assert again.config.num_keypoints == arrays["source_kp_value"].shape[1]
    assert again.report == measured
    assert again.report.reenactment.keys() == {"onnxruntime", "torch"}
    assert again.report.failures() == []
