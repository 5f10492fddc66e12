"""What int8 is calibrated on: frames of folders and of drawn heads, and what they make of each graph's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dagan_rt.errors import InputError  # noqa: E402
from dagan_rt.export.calibration import clips, record  # noqa: E402
from dagan_rt.export.subnetworks import parts, subnetworks  # noqa: E402
from dagan_rt.images import write_image  # noqa: E402
from dagan_rt.keypoints import KeyPoints  # noqa: E402
from dagan_rt.networks.variants import VARIANTS  # noqa: E402
from dagan_rt.training import heads  # noqa: E402
from dagan_rt.transfer import transfer  # noqa: E402
from dagan_rt.video import VideoWriter  # noqa: E402


def write_clip(path: Path, levels: list[int]) -> None:
    """A frame of one grey level after another, wider than high; the sides beyond the central square are white."""
    with VideoWriter(path, fps=25, width=96, height=64, crf=0) as writer:
        for level in levels:
            image = np.full((64, 96, 3), 255, np.uint8)
            image[:, 16:80] = level
            writer.write(image)


def middles(clip: np.ndarray) -> list[int]:
    return [int(frame[8:-8, 8:-8].mean().round()) for frame in clip]


def test_heads_are_of_training_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = heads.draw_clip

    def noted(identity: int, *numbers: int) -> heads.Clip:
        drawn.append(identity)
        return draw(identity, *numbers)

    monkeypatch.setattr(heads, "draw_clip", noted)
    faces = clips("heads", 32, 12)
    assert len(set(drawn)) == 3 and all(it in heads.TRAINING and it not in heads.HELD_OUT for it in drawn)
    assert [(clip.shape, clip.dtype) for clip in faces] == [((4, 32, 32, 3), np.uint8)] * 3
    assert all((clip[0] != clip[-1]).any() for clip in faces)  # it moves
    assert all((one == two).all() for one, two in zip(faces, clips("heads", 32, 12), strict=True))


def test_frames_are_spread_over_a_video(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", list(range(20, 220, 2)))
    (clip,) = clips(tmp_path / "a.mp4", 32, 8)
    assert clip.shape == (8, 32, 32, 3) and clip.dtype == np.uint8
    found = middles(clip)
    assert found[0] == pytest.approx(20, abs=2) and found[-1] > 165
    steps = np.diff(found)
    assert steps.min() >= 14 and steps.max() <= 34  # an even spread takes 25
    assert (clip[:, :, 0] < 230).all()  # the white sides are cut off


def test_a_short_video_gives_all_it_has(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", [40, 80, 120])
    (clip,) = clips(tmp_path, 32, 8)
    assert middles(clip) == pytest.approx([40, 80, 120], abs=2)


def test_a_folder_gives_clips_and_the_images_of_each_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_clip(tmp_path / "b.mp4", [60] * 9)
    for number in range(10):
        write_image(tmp_path / "deep" / "er" / f"{number}.png", np.full((40, 50, 3), 10 * number, np.uint8))
    (tmp_path / "notes.txt").write_text("no face")
    faces = clips(tmp_path, 32, 8)
    assert [middles(clip) for clip in faces] == [pytest.approx([60] * 4, abs=2), [0, 20, 50, 70]]
    for number in range(30):
        write_clip(tmp_path / f"c{number:02}.mp4", [2 * number + 100])
    faces = clips(tmp_path, 32, 20)  # five of 32 clips
    assert len(faces) == 5 and sum(map(len, faces)) <= 20


def test_one_image_is_enough(tmp_path: Path) -> None:
    write_image(tmp_path / "face.png", np.full((40, 40, 3), 77, np.uint8))
    assert middles(clips(tmp_path / "face.png", 32)[0]) == [77]


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^calibration data .*nowhere does not exist: give a folder with"):
        clips(tmp_path / "nowhere", 32)
    with pytest.raises(InputError, match=r"^calibration data .* holds no video and no image: expected files ending in"):
        clips(tmp_path, 32)
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(InputError, match=r"bad\.mp4"):
        clips(tmp_path, 32)
    (tmp_path / "bad.mp4").rename(tmp_path / "bad.png")
    with pytest.raises(InputError, match=r"bad\.png"):
        clips(tmp_path, 32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_subnetwork_gets_what_it_declares(small_model: Any, variant: str) -> None:
    model = small_model(variant)
    declared = (*subnetworks(model.config), *parts(model.config))
    samples = record(model, declared, "heads", 4)
    assert set(samples) == {subnetwork.name for subnetwork in declared}
    for subnetwork in declared:
        assert len(samples[subnetwork.name]) == 4
        for sample in samples[subnetwork.name]:
            shapes = {tensor.name: (1, *tensor.shape[1:]) for tensor in subnetwork.inputs}
            assert {name: x.shape for name, x in sample.items()} == shapes
            assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in sample.values())


def test_samples_are_those_of_a_reenactment(small_model: Any) -> None:
    """The second clip drives the first face of the third one: against the undivided network and NumPy's transfer."""
    model = small_model("dagan")
    declared = (*subnetworks(model.config), *parts(model.config))
    samples = record(model, declared, "heads", 12)
    faces = clips("heads", model.config.size, 12)
    source, initial, driving = (
        torch.from_numpy(face).permute(2, 0, 1)[None].float() / 255 for face in (faces[2][0], faces[1][0], faces[1][3])
    )
    with torch.inference_mode():
        at, begun, now = (
            KeyPoints(*(x.numpy() for x in model.find_keypoints(image))) for image in (source, initial, driving)
        )
        moved = KeyPoints(*map(torch.from_numpy, transfer(at, now, begun)))
        found = model.generator(source, KeyPoints(*map(torch.from_numpy, at)), moved, model.depth(source))
    sample = {key: x for name in samples for key, x in samples[name][7].items()}
    for key, expected in {
        "image": driving, "source_kp_value": at.value, "initial_kp_value": begun.value, "driving_kp_value": now.value,
        "driving_kp_jacobian": now.jacobian, "initial_kp_jacobian": begun.jacobian,
        "flow": found.motion.flow, "occlusion": found.motion.occlusion, "warped_feature": found.warped_feature,
        "attended_feature": found.attended_feature,
    }.items():  # fmt: skip
        np.testing.assert_allclose(sample[key], np.asarray(expected), atol=1e-3, err_msg=key)
    own = samples["motion"][0]  # the first clip drives itself: its first frame is source, initial and driving
    np.testing.assert_array_equal(own["source_kp_value"], own["driving_kp_value"])
    np.testing.assert_array_equal(own["initial_kp_value"], own["driving_kp_value"])
