"""The loader: batches by number, whoever makes them, whatever fails on the way."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt.errors import InputError
from dagan_rt.training.data import Augmentation, BadClip, ClipFolder, HeadsData, Loader, sample

PLAIN = Augmentation.none()


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


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


def test_a_clip_that_fails_while_training_is_replaced_by_another(tmp_path: Path, write_frames: Any) -> None:
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


@pytest.mark.parametrize("neighbours", [0, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
def test_ranks_together_see_what_one_process_would(pictures: Any, world: int, neighbours: int) -> None:
    clips = pictures([3, 5, 2, 8, 4])
    whole = Loader(
        clips, 12, 7, Augmentation(), repeats=2, neighbours=neighbours
    )  # 10 items: epochs end within batches
    parts = [
        Loader(clips, 12, 7, Augmentation(), repeats=2, neighbours=neighbours, part=(rank, world))
        for rank in range(world)
    ]
    for step in range(4):
        shares = [part.batch(step) for part in parts]
        assert all(len(share[name]) == 12 // world for share in shares for name in share)
        joined = {name: np.concatenate([share[name] for share in shares]) for name in shares[0]}
        assert same(joined, whole.batch(step))
    assert all(part.items == whole.items == 10 and part.size == 12 for part in parts)


def test_a_batch_that_cannot_be_shared_is_refused(pictures: Any) -> None:
    clips = pictures([3])
    with pytest.raises(InputError, match="batch must be a multiple of the number of processes, got 8 for 3"):
        Loader(clips, 8, 0, PLAIN, part=(0, 3))
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="part must be"):
            Loader(clips, 8, 0, PLAIN, part=part)
    with pytest.raises(InputError, match="neighbours must not be negative"):
        Loader(clips, 8, 0, PLAIN, neighbours=-1)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_bad_clips_are_counted_named_once_and_replaced_for_good(pictures: Any, neighbours: int) -> None:
    """Whatever was read before, by whom, in how many threads: the same replacements."""
    clips = pictures([5, 4, 6, 3])
    clips.bad = {1}
    clips.bad_frames = {(2, 3)}
    augmentation = Augmentation(jitter=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loader = Loader(clips, 4, 7, augmentation, repeats=4, threads=3, neighbours=neighbours)
        with contextlib.closing(loader.from_step(0)) as batches:
            run = [next(batches) for _ in range(8)]
    assert sorted(str(warning.message).split(": ")[1] for warning in told) == ["clip 1", "clip 2"]
    assert loader.bad.keys() == {"clip 1", "clip 2"} and loader.bad["clip 1"].reason == "clip 1 is bad"
    assert loader.bad["clip 1"].count >= 8 and loader.bad["clip 2"].count >= 1  # 32 items: two epochs
    for batch in run:
        for name in ("target", "before", "after") if neighbours else ("source", "driving"):
            marks = np.rint(batch[name][:, 2].mean((1, 2)) * 255).astype(int)  # see `pictures`
            assert not {1} & set(marks // 16) and 16 * 2 + 3 not in marks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = Loader(clips, 4, 7, augmentation, repeats=4, neighbours=neighbours)
        assert all(same(fresh.batch(step), run[step]) for step in (6, 2, 7))  # nothing had failed in it before
        second = Loader(clips, 4, 7, augmentation, repeats=4, neighbours=neighbours, part=(1, 2))
        assert same(second.batch(5), {name: array[2:] for name, array in run[5].items()})


def test_a_clip_that_turns_bad_changes_its_own_items_alone(pictures: Any) -> None:
    clips = pictures([5, 4, 6, 3])
    loader = Loader(clips, 4, 7, Augmentation(), repeats=4)
    before = [loader.batch(step) for step in range(4)]
    clips.bad = {1}
    with pytest.warns(UserWarning, match="clip skipped: clip 1: clip 1 is bad"):
        after = [loader.batch(step) for step in range(4)]
    for step in range(4):
        for at, (_, index) in enumerate(loader.numbers(step)):
            equal = all(np.array_equal(before[step][name][at], after[step][name][at]) for name in before[step])
            assert equal == (index % 4 != 1)
    clips.bad = set()
    assert all(same(loader.batch(step), before[step]) for step in range(4))  # repaired: as if nothing had been


def test_when_nothing_can_be_read_the_run_ends_with_one_sentence(pictures: Any) -> None:
    clips = pictures([5, 4])
    clips.bad = {0, 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = Loader(clips, 4, 7, PLAIN, threads=2)
        with contextlib.closing(loader.from_step(0)) as batches, pytest.raises(InputError, match="20 clips in a row"):
            next(batches)
    assert sum(failures.count for failures in loader.bad.values()) >= 20


def test_a_run_goes_on_when_files_vanish_under_it(
    tmp_path: Path, write_frames: Any, pack: Any, write_video: Any
) -> None:
    for number in range(3):
        write_frames(tmp_path / f"folder{number}", [20 * number + 20, 20 * number + 30])
        pack(tmp_path / f"folder{number}")
        write_video(tmp_path / f"video{number}.mp4", [20 * number + 20, 20 * number + 30])
    loader = Loader(ClipFolder(tmp_path, 16, progress=False), 9, 0, Augmentation(), threads=2)
    with warnings.catch_warnings(), contextlib.closing(loader.from_step(0)) as batches:
        warnings.simplefilter("ignore")
        next(batches)
        (tmp_path / "folder0" / "0000.png").unlink()
        (tmp_path / "folder1.zip").write_bytes(b"PK")
        (tmp_path / "video2.mp4").write_bytes(b"\0" * 100)
        for _ in range(6):
            assert next(batches)["source"].shape == (9, 3, 16, 16)
    assert sorted(loader.bad) == ["folder0", "folder1.zip", "video2.mp4"]
    assert all(failures.reason and failures.count for failures in loader.bad.values())


def test_a_sample_alone_warns_by_itself(pictures: Any) -> None:
    clips = pictures([3, 3])
    clips.bad = {0}
    with pytest.warns(UserWarning, match="clip skipped: clip 0"):
        sample(clips, PLAIN, 0, 0, 0)
    told: list[tuple[str, str]] = []

    def remember(name: str, error: BadClip) -> None:
        told.append((name, str(error)))

    sample(clips, PLAIN, 0, 0, 0, remember)
    assert set(told) == {("clip 0", "clip 0 is bad")}
