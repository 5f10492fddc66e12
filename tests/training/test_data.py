"""Data: what a sample holds, that it depends on nothing but its number, and what bad folders answer."""

from __future__ import annotations

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.training import heads
from dagan_rt.training.augment import LANDMARK_MIRROR, colour_matrix, jitter, mirror_landmarks
from dagan_rt.training.data import Augmentation, ClipFolder, HeadsData, Loader, disparity_of, sample, shrink
from dagan_rt.training.recipe import parse_recipe
from dagan_rt.training.sets import data_sets

PLAIN = Augmentation.none()


def gray(level: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def write_video(path: Path, levels: list[int], height: int = 48, width: int = 64) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if path.suffix == ".mp4" else "gif", rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if path.suffix == ".mp4" else "rgb8"
        if path.suffix == ".mp4":
            stream.options = {"crf": "1", "g": "4", "bf": "2"}  # several key frames, and frames out of order
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(gray(level, height, width), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_frames(folder: Path, levels: list[int], ending: str = "png") -> None:
    folder.mkdir(parents=True)
    for number, level in enumerate(levels):
        Image.fromarray(gray(level)).save(folder / f"{number:04d}.{ending}")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipFolder:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", list(range(10, 250, 20)))
    write_video(folder / "b.gif", [0, 109, 182, 255])
    write_frames(folder / "people" / "c", [15, 95, 175])
    write_frames(folder / "people" / "d", [40, 200], "jpg")
    return ClipFolder(folder, 16, progress=False)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> HeadsData:
    return HeadsData(range(3), 4, 64, cache=tmp_path_factory.mktemp("cache"), workers=1, progress=False)


def test_every_frame_of_every_kind_of_clip_is_the_right_one(clips: ClipFolder) -> None:
    assert [clips.name(i) for i in range(len(clips))] == ["a.mp4", "b.gif", "people/c", "people/d"]
    expected = [list(range(10, 250, 20)), [0, 109, 182, 255], [15, 95, 175], [40, 200]]
    for clip, levels in enumerate(expected):
        assert clips.frame_count(clip) == len(levels)
        backwards = list(range(len(levels)))[::-1]
        means = [frame.image.mean() for frame in clips.read(clip, backwards)]
        assert means == pytest.approx(levels[::-1], abs=20 if clip == 1 else 3)


def test_frames_are_the_central_square(tmp_path: Path) -> None:
    picture = gray(0, 20, 60)
    picture[:, 20:40] = 200
    (tmp_path / "clip").mkdir()
    for name in "ab":
        Image.fromarray(picture).save(tmp_path / "clip" / f"{name}.png")
    (frame,) = ClipFolder(tmp_path, 10, progress=False).read(0, [0])
    assert frame.image.shape == (10, 10, 3) and (frame.image == 200).all()


def test_a_sample_is_a_function_of_its_number_alone(clips: ClipFolder, drawn: HeadsData) -> None:
    for data in (clips, drawn):
        first = sample(data, Augmentation(), 3, 1, 5)
        sample(data, Augmentation(), 3, 1, 6)
        again = sample(data, Augmentation(), 3, 1, 5)
        assert all(np.array_equal(first[name], again[name]) for name in first)
        for other in ((4, 1, 5), (3, 2, 5), (3, 1, 5 + len(data))):
            assert not np.array_equal(first["source"], sample(data, Augmentation(), *other)["source"])


def test_a_sample_has_two_different_frames_of_one_clip(clips: ClipFolder) -> None:
    pairs = set()
    for index in range(0, 160, 4):  # always clip a.mp4
        item = sample(clips, PLAIN, 0, 0, index)
        assert item["source"].shape == (3, 16, 16) and item["source"].dtype == np.float32
        levels = [round((float(item[name].mean()) * 255 - 10) / 20) for name in ("source", "driving")]
        assert levels[0] != levels[1] and all(0 <= level < 12 for level in levels)
        pairs.add(tuple(levels))
    assert len(pairs) > 20


def test_the_loader_continues_where_it_stopped(drawn: HeadsData) -> None:
    loader = Loader(drawn, 4, 7, Augmentation(), repeats=5, threads=2)
    batches = loader.from_step(0)
    run = [next(batches) for _ in range(6)]
    batches.close()
    later = Loader(drawn, 4, 7, Augmentation(), repeats=5).from_step(4)
    for expected, got in zip(run[4:], later, strict=False):
        assert all(np.array_equal(expected[name], got[name]) for name in expected)
    later.close()


def test_an_epoch_visits_every_item_once(drawn: HeadsData) -> None:
    loader = Loader(drawn, 4, 7, PLAIN, repeats=4)  # 12 items, 3 batches an epoch
    for epoch in range(2):
        numbers = [number for step in range(3) for number in loader.numbers(3 * epoch + step)]
        assert {e for e, _ in numbers} == {epoch} and sorted(i for _, i in numbers) == list(range(12))
    assert loader.numbers(0) != [(0, i) for _, i in loader.numbers(3)]


def test_mirrored_heads_keep_landmarks_and_disparity_on_the_face(drawn: HeadsData) -> None:
    flipping = Augmentation(flip=True, time_flip=False, jitter=0)
    flipped = 0
    for index in range(0, 30, 3):
        plain, item = sample(drawn, Augmentation(False, False, 0), 0, 0, index), sample(drawn, flipping, 0, 0, index)
        if np.array_equal(plain["source"], item["source"]):
            continue
        flipped += 1
        for name in ("source", "driving"):
            assert np.array_equal(item[name], plain[name][:, :, ::-1])
            assert np.array_equal(item[f"{name}_disparity"], plain[f"{name}_disparity"][:, :, ::-1])
            got, before = item[f"{name}_landmarks"], plain[f"{name}_landmarks"]
            # Each landmark lies on the mirrored place of its partner: the jaw still runs from left to right.
            assert np.array_equal(got[16], before[0] * [-1, 1]) and np.array_equal(got[36], before[45] * [-1, 1])
            assert np.sign(got[16, 0] - got[0, 0]) == np.sign(before[16, 0] - before[0, 0])
    assert 0 < flipped < 10


def test_the_mirror_permutation_on_a_symmetric_face() -> None:
    """Against the drawing code: a face seen from the front with a symmetric expression is its own mirror image."""
    from dagan_rt.training.heads.person import draw_person
    from dagan_rt.training.heads.shape import landmark_points, make_face

    assert np.array_equal(LANDMARK_MIRROR[LANDMARK_MIRROR], np.arange(68))
    neutral = [0.3, 0.5, 0.2, 0.2, 0.5, 0.5, 0.5]
    points = landmark_points(make_face(draw_person(4), np.array(neutral)[:, None, None]))[0][:, :2]
    assert np.abs(points[:, 0]).max() > 0.3
    assert mirror_landmarks(points) == pytest.approx(points, abs=0.02)  # the ears are traced from one side


def test_heads_are_what_the_drawing_code_drew(drawn: HeadsData) -> None:
    clip = heads.draw_clip(2, 4, 64)
    (frame,) = drawn.read(2, [3])
    assert np.array_equal(frame.image, clip.frames[3])
    assert np.array_equal(frame.landmarks, clip.landmarks[3])
    nearest, farthest = clip.depth.min(), clip.depth.max()
    expected = (1 / clip.depth[3].astype(np.float64) - 1 / farthest) / (1 / nearest - 1 / farthest)
    assert frame.disparity == pytest.approx(expected, abs=2e-5)
    assert frame.disparity[2, 2] == 0 and frame.disparity[24:40, 24:40].mean() > 0.5  # background far, face near


def test_smaller_heads_are_area_averages_with_landmarks_on_the_same_spot(drawn: HeadsData) -> None:
    (small,), (large,) = drawn.at_size(32).read(1, [2]), drawn.read(1, [2])
    assert small.image.shape == (32, 32, 3)
    average = large.image.astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(small.image - average).max() <= 0.5
    assert small.disparity == pytest.approx(large.disparity.reshape(32, 2, 32, 2).mean((1, 3)), abs=1e-5)
    # In pixel edges (0 to size) instead of pixel centres a landmark's place only scales.
    edges = [(points + 1) / 2 * (size - 1) + 0.5 for points, size in ((small.landmarks, 32), (large.landmarks, 64))]
    assert edges[0] * 2 == pytest.approx(edges[1], abs=1e-4)
    with pytest.raises(InputError, match="drawn at 64 cannot be averaged to 48"):
        drawn.at_size(48)


def test_drawn_heads_are_found_again_and_other_parameters_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(heads, "draw_clip", lambda *_: pytest.fail("drawn twice"))
        HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    HeadsData(range(1), 2, 32, seed=1, cache=tmp_path, workers=1, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(heads, "draw_clip", fail)
    with pytest.raises(OSError, match="disk full"):
        HeadsData(range(1), 2, 32, cache=tmp_path, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_worker_processes_draw_the_same_heads(tmp_path: Path) -> None:
    parallel = HeadsData(range(8), 2, 32, cache=tmp_path / "two", workers=2, progress=False)
    alone = HeadsData(range(8), 2, 32, cache=tmp_path / "one", workers=1, progress=False)
    for clip in range(8):
        assert np.array_equal(parallel.read(clip, [1])[0].image, alone.read(clip, [1])[0].image)


def test_disparity() -> None:
    depth = np.array([[2.0, 4.0], [3.0, 8.0]])
    assert disparity_of(depth, 2.0, 4.0) == pytest.approx(np.array([[1.0, 0.0], [1 / 3, 0.0]]))


@pytest.mark.parametrize(("side", "size"), [(12, 4), (12, 12), (8, 2)])
def test_shrink_is_the_mean_of_blocks(side: int, size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    f = side // size
    expected = [[image[y * f : y * f + f, x * f : x * f + f].mean((0, 1)) for x in range(size)] for y in range(size)]
    assert shrink(image, size) == pytest.approx(np.array(expected), abs=1e-4)
    with pytest.raises(InputError, match="by whole blocks"):
        shrink(image, 5)


def test_colour_jitter_is_what_it_says() -> None:
    image = np.random.default_rng(0).random((6, 5, 3)).astype(np.float32)
    same = np.eye(3)
    assert jitter(image, same, 1.0) == pytest.approx(image, abs=1e-6)
    flat = jitter(image, same, 0.0)  # no contrast: the mean luma everywhere
    assert flat == pytest.approx(np.full_like(flat, float((image @ [0.299, 0.587, 0.114]).mean())), abs=1e-5)
    matrix, contrast = colour_matrix(np.random.default_rng(1), 0.1)
    neutral = np.full((2, 2, 3), 0.5, np.float32)
    coloured = jitter(neutral, matrix, contrast)
    assert np.ptp(coloured) < 2e-3  # gray stays gray whatever the hue and saturation
    assert 0.9 <= float(coloured.mean()) / 0.5 <= 1.1
    assert 0.9 <= contrast <= 1.1


def test_bad_clips_are_left_out_and_counted(tmp_path: Path) -> None:
    write_frames(tmp_path / "good", [10, 20])
    write_frames(tmp_path / "lonely", [10])
    (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.gif").write_bytes(b"")
    clips = ClipFolder(tmp_path, 8, progress=False)
    assert len(clips) == 1
    assert sorted(path.name for path, _ in clips.bad) == ["empty.gif", "lonely", "noise.mp4"]
    recipe = parse_recipe(
        f'[data]\nkind = "clips"\npath = "{tmp_path}"\nheld_out = 0\n[[stage]]\nname = "a"\nsteps = 1\nsize = 32'
    )
    with pytest.warns(UserWarning, match="3 of 4 clips"):
        data_sets(recipe, progress=False)


def test_a_clip_that_fails_while_training_is_replaced_by_another(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", [100, 100])
    write_frames(tmp_path / "b", [10, 20])
    clips = ClipFolder(tmp_path, 8, progress=False)
    for file in (tmp_path / "b").iterdir():
        file.write_bytes(b"gone")
    with pytest.warns(UserWarning, match="clip skipped"):
        item = sample(clips, PLAIN, 0, 0, 1)
    assert item["source"] * 255 == pytest.approx(np.full((3, 8, 8), 100.0))
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    with warnings.catch_warnings(), pytest.raises(InputError, match="20 clips in a row"):
        warnings.simplefilter("ignore")
        sample(clips, PLAIN, 0, 0, 0)


def test_folders_that_hold_nothing_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        ClipFolder(tmp_path / "nowhere", 8)
    with pytest.raises(InputError, match="holds no clips; expected videos"):
        ClipFolder(tmp_path, 8)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 clips, none of them readable \(first: a.mp4"):
        ClipFolder(tmp_path, 8)


def test_held_out_clips_are_never_trained_on(tmp_path: Path) -> None:
    for number in range(6):
        write_frames(tmp_path / f"clip{number}", [number, number])
    text = '[data]\nkind = "clips"\npath = "{}"\nheld_out = {}\n[[stage]]\nname = "a"\nsteps = 1\nsize = 32'
    training, held_out = data_sets(parse_recipe(text.format(tmp_path, 2)), progress=False)
    names = [{clips.name(i) for i in range(len(clips))} for clips in (training, held_out)]
    assert len(names[0]) == 4 and len(names[1]) == 2 and not names[0] & names[1]
    with pytest.raises(InputError, match="nothing is left to train on"):
        data_sets(parse_recipe(text.format(tmp_path, 6)), progress=False)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "clip0").rename(tmp_path / "train" / "x")
    (tmp_path / "clip1").rename(tmp_path / "test" / "y")
    training, held_out = data_sets(parse_recipe(text.format(tmp_path, 2)), progress=False)
    assert (training.name(0), held_out.name(0), len(training), len(held_out)) == ("x", "y", 1, 1)


def test_a_share_of_pairs_stands_still(drawn: HeadsData) -> None:
    still = Augmentation(flip=True, time_flip=True, jitter=0.1, still=0.5)
    pairs = [sample(drawn, still, 0, 0, index) for index in range(60)]
    same = [
        all(np.array_equal(pair[f"source{end}"], pair[f"driving{end}"]) for end in ("", "_landmarks")) for pair in pairs
    ]
    assert 15 < sum(same) < 45
    moving = [sample(drawn, Augmentation(), 0, 0, index) for index in range(20)]
    assert not any(np.array_equal(pair["source"], pair["driving"]) for pair in moving)
