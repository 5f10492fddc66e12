"""Runs of the page, without a page."""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dagan_rt import driving
from dagan_rt.bundle import write_manifest
from dagan_rt.cropping import around, center
from dagan_rt.errors import InputError
from dagan_rt.faces import Face
from dagan_rt.images import center_square, read_image
from dagan_rt.page import markup, runs
from dagan_rt.page.line import Line
from dagan_rt.page.runs import Request, State, Studio, sentence
from dagan_rt.reenactor import Reenactor
from dagan_rt.video import VideoReader, VideoWriter


@pytest.fixture(scope="module")
def studio(tiny_bundle: Path) -> Studio:
    return Studio(tiny_bundle, "onnxruntime", 1, most_seconds=2, most_people=3)


@pytest.fixture
def request_(given: dict[str, Path], tmp_path: Path) -> Request:
    return Request(given["portrait"], given["clip"], tmp_path)


def source_of(path: Path) -> np.ndarray:
    picture = read_image(path)
    return center(picture.shape[1], picture.shape[0]).cut(picture, 64)


@pytest.mark.parametrize(
    ("motion", "adapt", "scale"),
    [("relative", False, 1.0), ("relative", True, 1.0), ("absolute", False, 1.0), ("relative", False, 0.5)],
)
def test_the_result_is_what_the_reenactor_gives(
    studio: Studio,
    request_: Request,
    tiny_bundle: Path,
    motion: str,
    adapt: bool,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[np.ndarray] = []

    class Watched(VideoWriter):
        def write(self, image: np.ndarray, *when: Any) -> None:
            written.append(image.copy())
            super().write(image, *when)

    monkeypatch.setattr(runs, "VideoWriter", Watched)
    states = list(studio.run(request_._replace(motion=motion, adapt_scale=adapt, motion_scale=scale)))
    model = Reenactor(tiny_bundle, "onnxruntime", motion, adapt, motion_scale=scale)
    with VideoReader(request_.clip) as reader, model as reenactor:
        reenactor.set_source(source_of(request_.portrait))
        expected = [reenactor.drive(center_square(frame, 64)) for frame in reader]
    assert len(expected) == 8 and (np.stack(written) == np.stack(expected)).all()
    done = states[-1]
    assert done.words.startswith("Done: 8 frames in ") and done.done == done.total == 8 and not done.failed
    assert done.result is not None and (done.result == expected[-1]).all()
    assert done.video is not None and done.video.parent.parent == request_.folder
    with av.open(str(done.video)) as made, av.open(str(request_.clip)) as clip:
        assert [stream.type for stream in made.streams] == ["video", "audio"]
        assert sum(1 for _ in made.decode(video=0)) == 8
        packets = [bytes(packet) for packet in clip.demux(audio=0)]
        made.seek(0)
        assert [bytes(packet) for packet in made.demux(audio=0)] == packets


def test_the_video_shows_the_whole_portrait_and_its_mark(
    studio: Studio, request_: Request, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `dagan-rt animate --paste-back --watermark` writes them; the pictures beside it are those of the model."""
    from dagan_rt.portrait import Pasted, read_portrait
    from dagan_rt.watermark import mark

    written: list[np.ndarray] = []
    write = VideoWriter.write
    monkeypatch.setattr("dagan_rt.portrait.LONGEST_PICTURE", 80)
    monkeypatch.setattr(
        VideoWriter, "write", lambda writer, image, *when: (written.append(image.copy()), write(writer, image, *when))
    )
    *_, last = studio.run(request_._replace(paste_back=True, watermark="visible"))
    portrait = read_portrait(request_.portrait, None, whole=True)
    with VideoReader(request_.clip) as reader, Reenactor(tiny_bundle, "onnxruntime") as reenactor:
        reenactor.set_source(*portrait.sources(64))
        results = [reenactor.drive(center_square(frame, 64)) for frame in reader]
    pasted = Pasted(portrait)
    expected = [mark(pasted([image]), "visible") for image in results]
    assert len(expected) == 8 and (np.stack(written) == np.stack(expected)).all()
    assert last.result is not None and (last.result == results[-1]).all()
    assert last.video is not None
    with VideoReader(last.video) as reader:
        assert (reader.width, reader.height) == (80, 54)


def test_states_show_the_run_as_it_goes_on(
    studio: Studio, request_: Request, small_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagan_rt.explanation import panels
    from dagan_rt.inspection import inspect

    monkeypatch.setattr(runs, "SHOWN_EVERY", 0.0)
    monkeypatch.setattr(runs, "LOOKING", 1.0)
    states = list(studio.run(request_))
    assert [state.words for state in states[:3]] == [
        "Reading the portrait and the clip.", "Frame 1 of 8.", "Frame 2 of 8.",
    ]  # fmt: skip
    assert [state.done for state in states[1:-1]] == list(range(1, 9)) and states[-1].video is not None
    fifth = states[5]
    assert fifth.looked_at == 5 and [row.what for row in fifth.latency] == ["whole frame", *runs.STAGES]
    assert all(row.seconds > 0 for row in fifth.latency)
    with VideoReader(request_.clip) as reader:
        frames = [center_square(frame, 64) for frame in reader]
    found = inspect(small_model("dagan"), source_of(request_.portrait), frames[4], frames[0])
    expected = [panel for panel in panels(found) if panel.title != "Result"]
    assert [panel.title for panel in fifth.panels] == [panel.title for panel in expected]
    assert all((ours.picture == theirs.picture).all() for ours, theirs in zip(fifth.panels, expected, strict=True))
    assert fifth.driving is not None and (fifth.driving == frames[4]).all()


def test_looking_inside_takes_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    looks = runs.Looks(object(), np.zeros((4, 4, 3), np.uint8), True, False, 1.0)

    class Found:
        seconds: dict[str, float] = {}

    def inspect(frame: np.ndarray) -> Any:
        now[0] += 1.0
        return Found()

    monkeypatch.setattr(looks, "_inspect", inspect)
    monkeypatch.setattr(runs, "_panels", lambda found: ())
    looked = []
    for number in range(1, 101):
        looks.look(np.zeros((4, 4, 3), np.uint8), number)
        if looks.at == number:
            looked.append(number)
        now[0] += 0.5
    assert looked[:3] == [1, 7, 13]  # a second of looking, three of frames
    assert len(looked) / (now[0] - 100) <= runs.LOOKING + 0.01


def test_bad_files_are_one_sentence_without_a_path(
    studio: Studio, request_: Request, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed, expected in [
        ({"portrait": given["text"]}, "Image text.png is not an image"),
        ({"portrait": given["clip"]}, "Image clip.mp4 is not an image"),
        ({"clip": given["text"]}, "Video text.png holds no frame that can be decoded"),
        ({"clip": given["broken"]}, "Video broken.mp4 is not a video this program reads, or is cut off"),
        ({"clip": given["long"]}, "The clip long.mp4 is longer than 2 seconds: cut it first"),
        ({"clip": given["portrait"].parent / "none.mp4"}, "Video none.mp4 does not exist"),
        ({"motion": "absolute", "adapt_scale": True}, "Adapt scale is about relative motion: switch it off"),
        ({"motion_scale": 5.0}, "Motion_scale must be 0 to 4, got 5"),
        ({"crop": "sideways"}, "Crop must be center or auto"),
        ({"watermark": "loud"}, "Watermark must be visible, invisible or nothing"),
    ]:
        *before, last = studio.run(request_._replace(**changed))
        assert all(state.done == 0 for state in before)  # found out before the work
        assert last.failed and last.video is None and last.words.startswith(expected), last.words
        assert str(given["clip"].parent) not in last.words and "/" not in last.words and "\n" not in last.words
        assert list(request_.folder.iterdir()) == []


def test_a_clip_without_a_face_says_so(
    studio: Studio, request_: Request, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def detector(image: np.ndarray) -> list[Face]:
        return [] if np.ptp(image) < 40 else [Face(np.array([20, 20, 44, 44], np.float32), 0.9)]

    monkeypatch.setattr(studio, "_detector", detector)
    *_, last = studio.run(request_._replace(crop="auto", clip=given["faceless"]))
    assert last.words == (
        "No face was found in faceless.mp4: choose center as the crop, or give one with a face that is clearer"
    )
    *_, last = studio.run(request_._replace(crop="auto"))
    assert last.video is not None and last.done == 8
    monkeypatch.setattr(studio, "_detector", lambda image: [])
    *_, last = studio.run(request_._replace(crop="auto"))
    assert last.words.startswith("No face was found in portrait.png: choose center as the crop")


def test_length_is_bounded_by_frames_that_are_read_not_by_the_header(
    studio: Studio, request_: Request, given: dict[str, Path], make_clip: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    class Liar(VideoReader):
        frame_count = property(lambda self: 5, lambda self, value: None)  # type: ignore[assignment]

    monkeypatch.setattr(driving, "VideoReader", Liar)
    *_, last = studio.run(request_._replace(clip=given["long"]))
    assert last.failed and last.words == "The clip long.mp4 is longer than 2 seconds: cut it first"
    (tmp_path / "given").mkdir()
    fast = make_clip(tmp_path / "given" / "fast.mp4", [np.full((16, 16, 3), 90, np.uint8)] * 300, rate=200)
    *_, last = studio.run(request_._replace(clip=fast))
    assert last.failed and "fast.mp4 is longer than 2 seconds" in last.words
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_what_only_a_programmer_understands_goes_to_the_log(
    studio: Studio, request_: Request, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for error, expected in [
        (ZeroDivisionError("float /srv/secret"), "Something went wrong in the program, not with your files; its log"),
        (MemoryError(), "This machine has not enough memory"),
        (OSError(28, "No space left on device", "/srv/x.mp4"), "Something went wrong in the program"),
    ]:

        def fail(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(VideoWriter, "write", fail)
        *_, last = studio.run(request_)
        assert last.failed and last.words.startswith(expected) and "/" not in last.words
        assert list(request_.folder.iterdir()) == []
    assert "ZeroDivisionError: float /srv/secret" in caplog.text
    assert studio.line.wait(studio.line.join(), 1) == 0  # nobody stands in the way
    studio.line._tickets.clear()


def test_paths_are_cut_to_their_names() -> None:
    for words, expected in [
        ("image /srv/x-1/ab/me.png is damaged", "Image me.png is damaged"),
        ("video '/srv/a/b.mp4' and /etc/passwd", "Video 'b.mp4' and passwd"),
        ("got 3/4 of frames, and/or less", "Got 3/4 of frames, and/or less"),
    ]:
        assert sentence(InputError(words)) == expected


def test_a_bundle_without_weights_shows_what_it_can(tiny_bundle: Path, tmp_path: Path, request_: Request) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_bundle, bare)
    shutil.rmtree(bare / "weights")
    described = json.loads((bare / "manifest.json").read_text())
    write_manifest(bare, {key: it for key, it in described.items() if key not in ("format", "version", "files")})
    studio = Studio(bare, "onnxruntime", 1)
    assert studio.blind == (
        "What happens inside is not shown. The bundle holds no weights to look into, export it without "
        "--no-torch-weights."
    )
    *_, last = studio.run(request_)
    assert last.video is not None and last.panels == () and [row.what for row in last.latency] == ["whole frame"]
    assert studio.blind in markup.inside(last, studio.blind)


def test_one_at_a_time_in_the_order_of_arrival(studio: Studio, request_: Request, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
    first, second, third = (studio.run(request_._replace(folder=folder)) for folder in folders)
    while next(first).done < 1:
        pass
    assert next(second).words == "Waiting: one run is before yours."
    assert next(third).words == "Waiting: 2 runs are before yours."
    refused = list(studio.run(request_))
    assert refused == [State("3 runs wait already, which is the most: try again in a minute", failed=True)]
    first.close()  # somebody closes the page
    assert list(folders[0].iterdir()) == []
    results = {}
    others = [
        threading.Thread(target=lambda it=it, name=name: results.update({name: [*it][-1]}))
        for name, it in (("second", second), ("third", third))
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert [results[name].video.parent.parent for name in ("second", "third")] == folders[1:]  # each has its own
    assert all(state.done == 8 for state in results.values())


def test_whoever_leaves_the_line_lets_the_others_move_up() -> None:
    line = Line(3)
    first, second, third = line.join(), line.join(), line.join()
    assert [line.wait(ticket, 0) for ticket in (first, second, third)] == [0, 1, 2]
    with pytest.raises(InputError, match="3 runs wait already"):
        line.join()
    line.leave(second)
    assert line.wait(third, 0) == 1
    moved: list[int] = []
    thread = threading.Thread(target=lambda: moved.append(line.wait(third, 10)))
    thread.start()
    line.leave(first)
    thread.join(5)
    assert moved == [0]


def test_a_camera_drives_frame_by_frame(
    studio: Studio, request_: Request, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = studio.live(request_.portrait)
    with VideoReader(request_.clip) as reader, Reenactor(tiny_bundle, "onnxruntime") as reenactor:
        reenactor.set_source(source_of(request_.portrait))
        for number, frame in enumerate(reader):
            if number == 4:
                live.reset()
                reenactor.reset()
            state = live.drive(frame)
            assert state.words == "Live." and state.done == number + 1
            assert state.result is not None and (state.result == reenactor.drive(center_square(frame, 64))).all()
    run = studio.run(request_)
    while next(run).done < 1:
        pass
    waiting = live.drive(frame)
    assert waiting.words == "Waiting: one run is before yours." and waiting.result is state.result
    run.close()
    assert live.drive(frame).done == 9
    live.close()
    bad = live.drive(np.zeros((4, 4), np.uint8))
    assert bad.failed and bad.words.startswith("Image must be uint8 [H, W, 3]")


def test_a_camera_is_cropped_to_the_face(studio: Studio, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def detector(image: np.ndarray) -> list[Face]:
        return [] if np.ptp(image) < 40 else [Face(np.array([10, 4, 40, 44], np.float32), 0.9)]

    monkeypatch.setattr(studio, "_detector", detector)
    monkeypatch.setattr("dagan_rt.cropping.PAUSE", 0.0)
    live = studio.live(request_.portrait, crop="auto")
    waiting = live.drive(np.full((48, 64, 3), 90, np.uint8))
    assert waiting.words == "No face is in sight yet." and waiting.result is None and not waiting.failed
    with VideoReader(request_.clip) as reader:
        frame = next(iter(reader))
    for _ in range(500):  # a search goes on beside
        state = live.drive(frame)
        if state.words == "Live.":
            break
        assert state.words == "No face is in sight yet."
        time.sleep(0.01)
    expected = around(np.array([10, 4, 40, 44]), 64, 64).cut(frame, 64)
    assert state.words == "Live." and state.driving is not None and (state.driving == expected).all()
    assert state.source is not None and (state.source != source_of(request_.portrait)).any()
    live.close()


def test_wrong_arguments(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="threads must be at least 1"):
        Studio(tiny_bundle, threads=0)
    with pytest.raises(InputError, match="most_seconds must be over 0"):
        Studio(tiny_bundle, most_seconds=0)


def test_names_of_files_are_text_not_markup() -> None:
    state = State("Video <script>alert(1)</script>&.mp4 is none", failed=True)
    assert "<script>" not in markup.progress(state) and "&lt;script&gt;" in markup.progress(state)
    shown = markup.now(replace(state, source=np.zeros((8, 8, 3), np.uint8)))
    assert shown.count("data:image/jpeg;base64,") == 1 and shown.count('class="empty"') == 2
