"""The served model without a server: requests of a test's own, on real streams over a device of plain arithmetic.

What comes out of the device holds its source, initial and driving frame in its pixels, so each answer tells whose it
is. Tests that need something to be under way close the device's gate.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image

from dagan_rt import InputError, Reenactor
from dagan_rt.backends import open_backend
from dagan_rt.bundle import Bundle
from dagan_rt.errors import DeviceLost
from dagan_rt.frames import GraphFrames
from dagan_rt.images import center_square, decode_image, encode_image
from dagan_rt.keypoints import KeyPoints
from dagan_rt.serving import sequences as served
from dagan_rt.serving.protocol import Settings
from dagan_rt.serving.sequences import Sequences
from dagan_rt.streams import Streams

SIZE = 16
PATIENCE = 20  # seconds before a test that hangs fails


class Device:
    """`Frames` whose image is level + its row: [source, initial, driving] in the first three pixels."""

    size, batches, ahead, slot_bytes, fixed_bytes = SIZE, (1, 2, 4, 8), 2, 0, 0

    def __init__(self, slots: int = 6) -> None:
        self.slots = slots
        self.sources, self.initial = [-1] * slots, [-1] * slots
        self.gate, self.preparing = threading.Event(), threading.Event()  # results, and sources, wait for these
        self.gate.set()
        self.preparing.set()
        self.fails: Callable[[str, int], Exception | None] = lambda what, level: None

    def set_source(self, slot: int, image: np.ndarray) -> None:
        assert self.preparing.wait(PATIENCE)
        self._fail("source", level(image))
        self.sources[slot], self.initial[slot] = level(image), -1

    def begin(self, slot: int, frame: np.ndarray | None, adapt_scale: bool = False, motion_scale: float = 1.0) -> None:
        if frame is not None:
            self._fail("begin", level(frame))
        self.initial[slot] = self.sources[slot] if frame is None else level(frame)

    def submit(self, slots: Any, frames: Any) -> Any:
        images = np.zeros((len(slots), SIZE, SIZE, 3), np.uint8)
        failure = None
        for image, slot, frame in zip(images, slots, frames, strict=True):
            image[0, :3] = np.array([self.sources[slot], self.initial[slot], level(frame)])[:, None]
            failure = failure or self.fails("submit", level(frame))
        return Pending(self, images, failure)

    def keypoints(self, image: np.ndarray) -> KeyPoints:
        self._fail("points", level(image))
        return KeyPoints(np.full((1, 3, 2), level(image), np.float32), np.zeros((1, 3, 2, 2), np.float32))

    def timed(self, slots: Any, frames: Any) -> Any:
        raise NotImplementedError

    def stages(self, batch: int) -> Mapping[str, Callable[[], None]]:
        return {}

    def close(self) -> None:
        pass

    def _fail(self, what: str, at: int) -> None:
        if (error := self.fails(what, at)) is not None:
            raise error


class Pending:
    def __init__(self, device: Device, images: np.ndarray, failure: Exception | None) -> None:
        self.device, self.images, self.failure = device, images, failure

    def done(self) -> bool:
        return self.device.gate.is_set()

    def result(self) -> np.ndarray:
        assert self.device.gate.wait(PATIENCE)
        if self.failure is not None:
            raise self.failure
        return self.images


def level(image: np.ndarray) -> int:
    return int(image[0, 0, 0])


def picture(at: int, side: int = SIZE) -> np.ndarray:
    return np.full((side, side, 3), at, np.uint8)


class Asked:
    """A request, which holds what was answered."""

    def __init__(self, sequence: int | str, *, start: bool = False, end: bool = False, many: bool = False,
                 wanted: Any = ("image", "image_encoded", "kp_value", "kp_jacobian"), gone: bool = False,
                 inputs: Any = None, **parameters: Any) -> None:  # fmt: skip
        self.sequence, self.start, self.end, self.many, self.wanted = sequence, start, end, many, wanted
        self.parameters: Mapping[str, Any] = parameters
        self.inputs: dict[str, np.ndarray] = dict(inputs or {})
        self.gone = gone
        self.sent: list[dict[str, np.ndarray]] = []
        self.finals = 0
        self.status = ""
        self.message = ""
        self.through = threading.Event()
        self.order: list[Asked] | None = None

    def cancelled(self) -> bool:
        return self.gone

    def answer(self, outputs: Mapping[str, np.ndarray], last: bool = True) -> None:
        self.sent.append(dict(outputs))
        if last:
            self._finish()
        if self.gone:
            raise OSError("the caller has gone")

    def refuse(self, status: str, message: str) -> None:
        self.status, self.message = status, message
        self._finish()

    def _finish(self) -> None:
        self.finals += 1
        if self.order is not None:
            self.order.append(self)
        self.through.set()

    @property
    def outcome(self) -> str:
        """Its status, once it is answered."""
        assert self.through.wait(PATIENCE), "never answered"
        return self.status or "OK"

    def shown(self, number: int = 0) -> tuple[int, ...]:
        """Source, initial frame and driving frame of an answer."""
        assert self.outcome == "OK", self.message
        return tuple(int(value) for value in self.sent[number]["image"][0, :3, 0])


def raw(*levels: int) -> np.ndarray:
    return np.stack([picture(at) for at in levels])


def encoded(*files: bytes) -> np.ndarray:
    return np.array([list(files)], object)


class Service:
    """Sequences on a device, and requests to them."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        self.device: Any = device if device is not None else Device()
        given = Settings(**{"sequences": 3, "queue": 4, "deadline": 0.0, **options})
        frames: Any = self.device
        self.streams = Streams(frames, most=given.sequences, batch=8, deadline=0, queue=given.queue)
        self.sequences = Sequences(self.streams, given)
        self.asked: list[Asked] = []
        self.order: list[Asked] = []

    def ask(self, sequence: int | str, inputs: Any = None, **options: Any) -> Asked:
        request = Asked(sequence, inputs=inputs, **options)
        request.order = self.order
        self.asked.append(request)
        self.sequences.accept(request)
        return request

    def start(self, sequence: int | str, source: int, frame: int | None = None, **options: Any) -> Asked:
        frames = {} if frame is None else {"frame": raw(frame)}
        return self.ask(sequence, {"source": raw(source), **frames}, start=True, **options)

    def step(self, sequence: int | str, *levels: int, **options: Any) -> Asked:
        return self.ask(sequence, {"frame": raw(*levels)}, **options)

    def end(self, sequence: int | str, **options: Any) -> Asked:
        return self.ask(sequence, {"end": np.ones((1, 1), bool)}, end=True, **options)

    def close(self) -> None:
        if isinstance(self.device, Device):
            self.device.gate.set()
            self.device.preparing.set()
        self.sequences.close()
        left = [request.finals for request in self.asked]
        assert left == [1] * len(left), f"answered {Counter(left)} times"
        assert not self.sequences._bytes and self.sequences._places == set(self.sequences._open.values())
        assert not any(request.inputs for request in self.asked if request.sequence != 0 and not request.status)


@pytest.fixture
def make() -> Iterator[Callable[..., Service]]:
    """`make(device, **settings)`: a service; every request of it must be answered once."""
    with contextlib.ExitStack() as stack:

        def make(*device: Any, **options: Any) -> Service:
            service = Service(*device, **options)
            stack.callback(service.close)
            return service

        yield make


def until(condition: Callable[[], Any]) -> None:
    waited = threading.Event()
    for _ in range(PATIENCE * 500):
        if condition():
            return
        waited.wait(0.002)
    raise AssertionError("it never came about")


# ---------------------------------------------------------------------------------------------------------------------
# the protocol, row by row


def test_a_session_from_start_to_end(make: Any) -> None:
    service = make()
    start = service.start(7, 10)
    assert start.outcome == "OK" and start.sent == [{}] and service.sequences.open == 1
    assert [service.step(7, at).shown() for at in (100, 101, 102)] == [(10, 100, at) for at in (100, 101, 102)]
    end = service.end(7)
    assert end.outcome == "OK" and end.sent == [{}] and service.sequences.open == 0
    assert service.step(7, 103).outcome == "NOT_FOUND"


def test_start_and_end_may_bring_a_frame_and_be_one_request(make: Any) -> None:
    service = make(sequences=1)
    assert service.start("a", 10, 100).shown() == (10, 100, 100)
    assert service.step("a", 101, end=True).shown() == (10, 100, 101)
    assert service.start("b", 20, 120, end=True).shown() == (20, 120, 120)
    assert service.start("c", 30, 130, motion="absolute").shown() == (30, 30, 130)
    assert service.step("b", 1).outcome == "NOT_FOUND" and service.sequences.open == 1


def test_a_restart_takes_the_place_of_the_former_even_where_all_are_taken(make: Any) -> None:
    service = make(sequences=1)
    service.start(1, 10).through.wait(PATIENCE)
    service.device.gate.clear()
    steps = [service.step(1, at) for at in (100, 101)]
    again = service.start(1, 20, restart=True)
    after = service.step(1, 102)
    service.device.gate.set()
    assert [step.shown() for step in steps] == [(10, 100, 100), (10, 100, 101)]  # taken before, and still answered
    assert again.outcome == "OK" and after.shown() == (20, 102, 102)
    assert service.order[-4:] == [*steps, again, after]
    assert service.start(2, 30, restart=True).outcome == "UNAVAILABLE"  # of nothing: one more
    assert service.end(1).outcome == "OK" and service.start(2, 30, restart=True).outcome == "OK"


def test_a_second_start_is_refused_and_changes_nothing(make: Any) -> None:
    service = make()
    assert service.start(1, 10, 100).outcome == "OK"
    second = service.start(1, 20)
    assert second.outcome == "ALREADY_EXISTS" and "restart" in second.message
    assert service.step(1, 101).shown() == (10, 100, 101)


def test_all_sequences_are_taken(make: Any) -> None:
    service = make(sequences=2)
    assert [service.start(id, 10).outcome for id in (1, 2, 3)] == ["OK", "OK", "UNAVAILABLE"]
    assert "all 2 sequences" in service.asked[-1].message
    for id in range(10, 20):  # the place is free as soon as END is answered
        assert service.end(id - 8 if id == 10 else id - 1).outcome == "OK"
        assert service.start(id, 20).outcome == "OK"


def test_end_is_answered_after_the_frames_before_it_and_ends_whatever_it_brings(make: Any) -> None:
    service = make(sequences=1, queue=2)
    service.start(1, 10).through.wait(PATIENCE)
    service.device.gate.clear()
    steps = [service.step(1, at) for at in (100, 101)]
    end = service.end(1)  # the queue is full, and END is taken all the same
    assert service.step(1, 102).outcome == "NOT_FOUND"
    assert service.start(1, 20).outcome == "UNAVAILABLE"  # its place is not free yet
    service.device.gate.set()
    assert end.outcome == "OK" and service.order[-3:] == [*steps, end]
    for wrong in ({"frame": raw(1, 2)}, {"source": raw(1)}, {"frame": np.zeros((1, 3, 3, 3), np.uint8)}):
        assert service.start(1, 30).outcome == "OK"
        assert service.ask(1, wrong, end=True).outcome == "INVALID_ARGUMENT"
        assert service.step(1, 103).outcome == "NOT_FOUND"
    assert service.start(1, 40).outcome == "OK"
    service.device.gate.clear()
    steps = [service.step(1, at) for at in (100, 101)]
    assert service.step(1, 104, end=True).outcome == "UNAVAILABLE"
    service.device.gate.set()
    assert [step.shown()[2] for step in steps] == [100, 101]
    until(lambda: service.start(2, 10).outcome == "OK")


POINTS = ("kp_value", "kp_jacobian")


def test_outputs_are_those_asked_for(make: Any) -> None:
    service = make()
    service.start(1, 10)
    service.step(1, 100)
    everything = service.step(1, 101)
    assert everything.outcome == "OK" and set(everything.sent[0]) == {"image"}
    both = service.step(1, 101, encoding="JPEG", quality=80)
    assert both.outcome == "OK" and set(both.sent[0]) == {"image", "image_encoded"}
    image, file = both.sent[0]["image"], both.sent[0]["image_encoded"]
    assert file.shape == (1,) and file[0] == encode_image(image, "JPEG", 80)
    png = service.step(1, 101, wanted=("image_encoded",))
    assert png.outcome == "OK" and set(png.sent[0]) == {"image_encoded"}
    assert (decode_image(png.sent[0]["image_encoded"][0], "it") == image).all()
    points = service.step(1, 102, wanted=POINTS)
    assert points.outcome == "OK" and set(points.sent[0]) == set(POINTS)
    assert (points.sent[0]["kp_value"] == 102).all() and points.sent[0]["kp_jacobian"].shape == (1, 3, 2, 2)
    one = service.step(1, 103, wanted=("kp_value",))
    assert one.outcome == "OK" and set(one.sent[0]) == {"kp_value"}
    assert service.step(1, 104).shown() == (10, 100, 104)  # points were found beside the session


def test_key_points_do_not_begin_the_motion(make: Any) -> None:
    service = make()
    assert service.start(1, 10, 90, wanted=POINTS).outcome == "OK"
    assert service.step(1, 100).shown() == (10, 100, 100)


def test_many_frames_in_one_request(make: Any) -> None:
    service = make()
    assert service.ask(1, {"source": raw(10), "frame": raw(100, 101)}, start=True, many=True).shown(1) == (10, 100, 101)
    four = service.step(1, 102, 103, 104, 105, many=True)
    assert four.outcome == "OK" and [four.shown(n)[2] for n in range(4)] == [102, 103, 104, 105]
    assert service.step(1, 1, 2, 3, 4, 5, many=True).outcome == "INVALID_ARGUMENT"  # never: the queue holds four
    two = service.step(1, 106, 107, many=True, wanted=POINTS)
    assert two.outcome == "OK" and [sent["kp_value"][0, 0, 0] for sent in two.sent] == [106, 107]
    service.device.gate.clear()
    assert service.step(1, 1, 2, many=True).status == ""
    three = service.step(1, 3, 4, 5, many=True)
    assert three.outcome == "UNAVAILABLE" and not three.sent  # all or none
    fitting = service.step(1, 6, 7, many=True)
    service.device.gate.set()
    assert [fitting.shown(n)[2] for n in range(2)] == [6, 7]


def test_encoded_images_are_cropped_and_resampled(make: Any) -> None:
    service = make()
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:, 10:50] = 77
    assert service.ask(1, {"source_encoded": encoded(encode_image(photo, "PNG"))}, start=True).outcome == "OK"
    step = service.ask(1, {"frame_encoded": encoded(encode_image(picture(100, 33), "JPEG"))})
    assert step.shown() == (77, 100, 100)
    order = [service.ask(1, {"frame_encoded": encoded(encode_image(picture(50, 300), "PNG"))}), service.step(1, 51)]
    assert [each.shown()[2] for each in order] == [50, 51]  # though the first takes longer


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong with a request


def bomb(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says to be as large as this."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.fromarray(picture(9, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


JPEG = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8), "JPEG")
WRONG_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "must carry a frame"),
    "source with a step": ({"source": raw(1), "frame": raw(1)}, "goes with START alone"),
    "encoded source with a step": ({"source_encoded": encoded(JPEG), "frame": raw(1)}, "goes with START alone"),
    "raw and encoded": ({"frame": raw(1), "frame_encoded": encoded(JPEG)}, "not both"),
    "two frames": ({"frame": raw(1, 2)}, "one frame, got 2"),
    "no frames": ({"frame": np.zeros((0, SIZE, SIZE, 3), np.uint8)}, "must carry a frame"),
    "wrong size": ({"frame": np.zeros((1, SIZE, SIZE + 1, 3), np.uint8)}, r"\[1, 16, 16, 3\], got uint8 \[1, 16, 17"),
    "wrong rank": ({"frame": np.zeros((SIZE, SIZE, 3), np.uint8)}, "must be uint8"),
    "wrong dtype": ({"frame": raw(1).astype(np.float32)}, "got float32"),
    "empty file": ({"frame_encoded": encoded(b"")}, "got 0 bytes"),
    "not bytes": ({"frame_encoded": np.array([[3]], object)}, "got int"),
    "too many bytes": ({"frame_encoded": encoded(bytes((32 << 20) + 1))}, "got 33554433 bytes"),
    "not an image": ({"frame_encoded": encoded(b"GIF89a" + bytes(20))}, "not an image this program reads"),
    "truncated": ({"frame_encoded": encoded(JPEG[: len(JPEG) // 2])}, "frame_encoded is damaged"),
    "header of 100 megapixels": ({"frame_encoded": encoded(bomb(10_000, 10_000))}, "too many pixels"),
    "bomb": ({"frame_encoded": encoded(bomb(5000, 5000, bytes(5000 * 15001)))}, "too many pixels"),
    "small": ({"frame_encoded": encoded(bomb(15, 16))}, "too small"),
    "scans": ({"frame_encoded": encoded(scans(200))}, "too many scans"),
}  # fmt: skip
WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"speed": 3}, "must be one of motion"),
    "kind": ({"quality": "3"}, "quality must be int"),
    "bool for int": ({"quality": True}, "quality must be int"),
    "quality": ({"quality": 96}, "1 to 95"),
    "encoding": ({"encoding": "GIF"}, "JPEG, PNG, WEBP"),
    "motion": ({"motion": "sideways"}, "relative or absolute"),
    "scale": ({"motion": "absolute", "adapt_scale": True}, "adapt_scale"),
    "motion scale": ({"motion_scale": 4.1}, "motion_scale must be 0 to 4, got 4.1"),
    "no number": ({"motion_scale": float("nan")}, "motion_scale must be 0 to 4, got nan"),
    "text for float": ({"motion_scale": "2"}, "motion_scale must be float, got '2'"),
    "bool for float": ({"motion_scale": True}, "motion_scale must be float, got 'True'"),
    "motion scale of absolute motion": ({"motion": "absolute", "motion_scale": 0.5}, "motion_scale scales relative"),
}


@pytest.fixture(scope="module")
def lasting() -> Iterator[Service]:
    service = Service()
    service.start(1, 10, 100)
    yield service
    service.close()


@pytest.mark.parametrize("wrong", WRONG_FRAMES)
def test_wrong_frames_are_refused_and_the_sequence_goes_on(lasting: Service, wrong: str) -> None:
    inputs, message = WRONG_FRAMES[wrong]
    refused = lasting.ask(1, inputs)
    assert refused.outcome == "INVALID_ARGUMENT"
    pytest.raises(InputError, _raise, refused.message).match(message)
    assert lasting.step(1, 101).shown() == (10, 100, 101)


@pytest.mark.parametrize("wrong", WRONG_OPTIONS)
def test_wrong_parameters_are_refused(lasting: Service, wrong: str) -> None:
    options, message = WRONG_OPTIONS[wrong]
    for refused in (lasting.step(1, 101, **options), lasting.start(2, 20, **options)):
        assert refused.outcome == "INVALID_ARGUMENT"
        pytest.raises(InputError, _raise, refused.message).match(message)
    assert lasting.step(1, 101).shown() == (10, 100, 101) and lasting.sequences.open == 1


def _raise(message: str) -> None:
    raise InputError(message)


WRONG_STARTS: dict[str, dict[str, Any]] = {
    "none": {"frame": raw(1)},
    "two": {"source": raw(1, 2)},
    "damaged": {"source_encoded": encoded(JPEG[:300])},
    "bomb": {"source_encoded": encoded(bomb(10_000, 10_000))},
    "frame": {"source": raw(1), "frame_encoded": encoded(b"xx")},
}


@pytest.mark.parametrize("wrong", WRONG_STARTS)
def test_a_failed_start_keeps_nothing_and_a_failed_restart_changes_nothing(make: Any, wrong: str) -> None:
    service = make(sequences=1)
    for _ in range(3):
        assert service.ask(1, WRONG_STARTS[wrong], start=True).outcome == "INVALID_ARGUMENT"
        assert service.step(1, 100).outcome == "NOT_FOUND" and service.sequences.open == 0
    assert service.start(1, 10, 100).outcome == "OK"
    assert service.ask(1, WRONG_STARTS[wrong], start=True, restart=True).outcome == "INVALID_ARGUMENT"
    assert service.step(1, 101).shown() == (10, 100, 101)


def test_what_waits_behind_a_failed_start_is_refused_up_to_the_next_one(make: Any) -> None:
    service = make(sequences=1, queue=8)
    service.device.preparing.clear()
    service.device.fails = lambda what, at: RuntimeError("burnt") if (what, at) == ("source", 13) else None
    first, behind = service.start(1, 13), service.step(1, 100)
    second, after = service.start(1, 20, restart=True), service.step(1, 101)
    service.device.preparing.set()
    assert first.outcome == "INTERNAL" and "burnt" in first.message
    assert behind.outcome == "NOT_FOUND" and "its START failed" in behind.message
    assert second.outcome == "OK" and after.shown() == (20, 101, 101)
    assert service.start(1, 13, restart=True).outcome == "INTERNAL"
    assert service.step(1, 102).outcome == "NOT_FOUND" and service.start(2, 30).outcome == "OK"


def test_a_start_whose_frame_cannot_begin_keeps_nothing(make: Any) -> None:
    service = make(sequences=1)
    service.device.fails = lambda what, at: InputError("no face") if (what, at) == ("begin", 13) else None
    start = service.start(1, 10, 13)
    assert start.outcome == "INVALID_ARGUMENT" and "no face" in start.message
    assert service.step(1, 100).outcome == "NOT_FOUND"
    assert service.start(1, 10).outcome == "OK"
    assert service.step(1, 13).outcome == "INVALID_ARGUMENT"  # but a step may fail: the next one begins the motion
    assert service.step(1, 100).shown() == (10, 100, 100)


def test_a_failing_frame_is_this_request_s_answer(make: Any, caplog: Any) -> None:
    service = make()
    service.device.fails = lambda what, at: RuntimeError("burnt") if at == 13 else None
    assert service.start(1, 10, 100).outcome == "OK"  # before the other comes: a batch fails as a whole
    for options in ({}, {"wanted": POINTS}):
        failed = service.step(1, 13, **options)
        assert failed.outcome == "INTERNAL" and "burnt" in failed.message and not failed.sent
    service.device.gate.clear()
    failed = service.step(1, 101, 13, 102, 13, many=True)  # is refused once, after the good one before it, or at once
    service.device.gate.set()
    assert failed.outcome == "INTERNAL" and len(failed.sent) <= 1
    assert service.step(1, 103).shown() == (10, 100, 103)
    assert "sequence 1 failed" in caplog.text


def test_a_lost_device_is_told_by_every_answer_and_shown(make: Any) -> None:
    service = make()
    service.start(1, 10, 100)
    service.start(2, 20, 100).through.wait(PATIENCE)
    service.device.gate.clear()
    service.device.fails = lambda what, at: DeviceLost("fell off the bus") if at == 13 else None
    lost = [service.step(1, 13), service.step(1, 101), service.step(2, 102)]
    assert not service.sequences.lost.is_set()
    service.device.gate.set()
    assert lost[0].outcome == "INTERNAL"
    later = [service.step(2, 103), service.start(3, 30), service.step(1, 104, wanted=POINTS), service.end(2)]
    assert [each.outcome for each in later] == ["INTERNAL", "INTERNAL", "INTERNAL", "OK"]
    assert "fell off the bus" in later[0].message and service.sequences.lost.is_set()


def test_nobody_works_for_a_caller_that_has_gone(make: Any, caplog: Any) -> None:
    service = make()
    assert service.start(1, 10, gone=True).outcome == "CANCELLED" and service.sequences.open == 0
    assert service.start(1, 10, 100).outcome == "OK"
    assert service.step(1, 1, gone=True, wanted=POINTS).outcome == "CANCELLED"
    assert service.step(1, 101, gone=True).outcome == "OK"  # costs more to ask than to drive; its answer fails
    assert service.step(1, 102).shown() == (10, 100, 102)
    assert "could not be sent" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# bounds


def test_a_flood_is_refused_and_what_is_under_way_stays_bounded(make: Any) -> None:
    service = make(queue=4)
    started = [service.start(1, 10, 100), service.start(2, 20, 110)]
    assert all(each.through.wait(PATIENCE) for each in started)
    until(lambda: not service.streams._under_way)  # what has been answered is counted a moment longer
    service.device.gate.clear()
    flood = [service.step(1, at % 256) for at in range(3000)]
    other = service.step(2, 111)
    assert [each.status for each in flood[4:]] == ["UNAVAILABLE"] * 2996 and "4 of at most 4" in flood[4].message
    assert len(service.streams._under_way) <= 2 and not any(each.through.is_set() for each in flood[:4])
    service.device.gate.set()
    assert [each.shown() for each in flood[:4]] == [(10, 100, at) for at in range(4)] and other.shown()[0] == 20
    assert service.sequences.refused == 2996
    until(lambda: service.step(1, 5).outcome == "OK")


def test_answers_that_are_not_sent_yet_count(make: Any) -> None:
    service = make(queue=2)
    service.start(1, 10, 100).through.wait(PATIENCE)
    sending, free = threading.Event(), threading.Event()

    class Slow(Asked):
        def answer(self, outputs: Any, last: bool = True) -> None:
            sending.set()
            assert free.wait(PATIENCE)
            super().answer(outputs, last)

    slow = Slow(1, inputs={"frame": raw(1)})
    service.asked.append(slow)
    service.sequences.accept(slow)
    assert sending.wait(PATIENCE)
    steps = [service.step(1, at) for at in (2, 3, 4)]
    until(lambda: service.streams.stats.driven == 4)  # all are driven, and wait for the one that is being sent
    assert [step.status for step in steps] == ["", "", "UNAVAILABLE"]
    free.set()
    assert [step.shown()[2] for step in steps[:2]] == [2, 3] and slow.shown()[2] == 1


def test_encoded_images_that_wait_are_bounded_together(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(served, "MOST_WAITING", 3 * len(JPEG))
    service = make(queue=8)
    service.device.preparing.clear()
    service.start(1, 10)
    steps = [service.ask(1, {"frame_encoded": encoded(JPEG)}) for _ in range(5)]
    assert [step.status for step in steps] == ["", "", "", "UNAVAILABLE", "UNAVAILABLE"]
    service.device.preparing.set()
    assert [step.outcome for step in steps[:3]] == ["OK"] * 3
    assert service.ask(1, {"frame_encoded": encoded(JPEG)}).outcome == "OK"


def test_a_slow_source_keeps_nobody_else_waiting(make: Any) -> None:
    service = make(sequences=3)
    service.start(1, 10, 100).through.wait(PATIENCE)
    service.device.preparing.clear()
    slow = [service.start(2, 20), service.start(3, 30)]
    points = service.step(1, 1, wanted=POINTS)  # is found after the source, but the caller's thread is free
    assert points.status == "" and not slow[0].through.is_set()
    service.device.preparing.set()
    assert [each.outcome for each in (*slow, points)] == ["OK"] * 3


def test_frames_go_on_while_sources_are_computed(make: Any) -> None:
    service = make(sequences=3)
    service.start(1, 10, 100).through.wait(PATIENCE)
    service.device.preparing.clear()
    slow = service.start(2, 20)
    assert [service.step(1, at).shown() for at in (101, 102)] == [(10, 100, 101), (10, 100, 102)]
    assert not slow.through.is_set()


def test_idle_sequences_are_freed_but_not_those_with_a_frame_under_way(make: Any) -> None:
    service = make(sequences=2, idle=0.2)
    service.start(1, 10, 100)
    service.start(2, 20, 110).through.wait(PATIENCE)
    service.device.gate.clear()
    slow = service.step(1, 101)
    until(lambda: service.sequences.open == 1)
    late = service.step(2, 111)
    assert late.outcome == "NOT_FOUND" and "0.2 seconds" in late.message
    time.sleep(0.3)
    assert service.sequences.open == 1
    assert service.start(2, 30, 120).status == ""  # its place was given back
    service.device.gate.set()
    assert slow.shown() == (10, 100, 101)
    until(lambda: service.sequences.open == 0)


def test_closing_answers_all_that_is_under_way(make: Any) -> None:
    service = make(queue=8)
    service.start(1, 10, 100).through.wait(PATIENCE)
    service.device.gate.clear()
    driving = [service.step(1, at) for at in (101, 102, 103)]
    until(lambda: service.streams.batches >= 2)
    waiting = [service.start(1, 20, restart=True), service.step(1, 104), service.end(1)]
    closer = threading.Thread(target=service.sequences.close)
    closer.start()
    assert [each.outcome for each in waiting] == ["UNAVAILABLE"] * 3
    refused = [service.start(5, 50), service.step(1, 1), service.end(1), service.ask(0)]
    assert [each.outcome for each in refused] == ["UNAVAILABLE", "UNAVAILABLE", "UNAVAILABLE", "UNAVAILABLE"]
    assert "unloaded" in refused[0].message
    service.device.gate.set()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert {each.outcome for each in driving} <= {"OK", "UNAVAILABLE"}


def test_a_warm_up_belongs_to_no_sequence(make: Any) -> None:
    service = make()
    warm = service.ask(0, {"end": np.ones((1, 1), bool)})
    assert warm.outcome == "OK" and service.sequences.open == 0 and service.streams.stats.driven == 1
    service.device.fails = lambda what, at: RuntimeError("burnt")
    assert service.ask(0).outcome == "INTERNAL"


# ---------------------------------------------------------------------------------------------------------------------
# any order


class AnyOrder(RuleBasedStateMachine):
    """Requests in any order against a model that predicts every status and whose pixels each answer shows.

    While the gate is closed, nothing is answered that needs the device, so that queues fill.
    """

    IDS = (1, 2, "3", 4)
    SEQUENCES, QUEUE = 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.service = Service(sequences=self.SEQUENCES, queue=self.QUEUE)
        self.open: dict[int | str, list[Any]] = {}  # source, initial frame, weight under way
        self.ending = 0  # places of those that ended and are not answered
        self.next = 0
        self.expected: list[tuple[Asked, Any]] = []  # a status, or what each answer shows

    def settled(self) -> None:
        if self.service.device.gate.is_set():
            for request, _ in self.expected:
                request.through.wait(PATIENCE)
            for state in self.open.values():
                state[2] = 0
            self.ending = 0

    def fresh(self) -> int:
        self.next = self.next % 250 + 1
        return self.next

    def expect(self, request: Asked, what: Any) -> None:
        self.expected.append((request, what))
        self.settled()

    @rule(id=st.sampled_from(IDS), restart=st.booleans(), absolute=st.booleans(), frame=st.booleans(),
          end=st.booleans(), bad=st.booleans())  # fmt: skip
    def start(self, id: Any, restart: bool, absolute: bool, frame: bool, end: bool, bad: bool) -> None:
        source, driving = self.fresh(), self.fresh() if frame else None
        options: dict[str, Any] = {"motion": "absolute"} if absolute else {}
        if bad:
            options["quality"] = 0
        request = self.service.start(id, source, driving, restart=restart, end=end, **options)
        known = self.open.get(id)
        status: Any = None
        if bad:
            status = "INVALID_ARGUMENT"
        elif known is None and len(self.open) + self.ending >= self.SEQUENCES:
            status = "UNAVAILABLE"
        elif known is not None and not restart:
            status = "ALREADY_EXISTS"
        elif known is not None and known[2] >= self.QUEUE:
            status = "UNAVAILABLE"
        else:
            state = [source, source if absolute else driving, known[2] if known else 0]
            self.open[id] = state
            self.take(request, state, int(frame))
            status = [(source, state[1], driving)] if frame else [None]
        if end and id in self.open:
            self._leave(id)
        self.expect(request, status)

    @rule(id=st.sampled_from(IDS), count=st.integers(1, 4), end=st.booleans(), bad=st.booleans())
    def step(self, id: Any, count: int, end: bool, bad: bool) -> None:
        frames = [self.fresh() for _ in range(count)]
        options = {"encoding": "BMP"} if bad else {}
        request = self.service.step(id, *frames, many=True, end=end, **options)
        known = self.open.get(id)
        status: Any = None
        if bad or count > self.QUEUE:
            status = "INVALID_ARGUMENT"
        elif known is None:
            status = "NOT_FOUND"
        elif known[2] + count > self.QUEUE:
            status = "UNAVAILABLE"
        else:
            known[1] = frames[0] if known[1] is None else known[1]
            self.take(request, known, count)
            status = [(known[0], known[1], frame) for frame in frames]
        if end and known is not None:
            self._leave(id)
        self.expect(request, status)

    @rule(id=st.sampled_from(IDS))
    def end(self, id: Any) -> None:
        request = self.service.end(id)
        known = id in self.open
        if known:
            self.take(request, self.open[id], 0)
            self._leave(id)
        self.expect(request, [None] if known else "NOT_FOUND")

    def take(self, request: Asked, state: list[Any], frames: int) -> None:
        """Count what is under way: whatever needs the device, and what has to wait for it."""
        if frames or state[2]:
            state[2] += max(1, frames)
        else:
            assert request.through.wait(PATIENCE)

    def _leave(self, id: Any) -> None:
        self.ending += self.open.pop(id)[2] > 0

    @precondition(lambda self: self.service.device.gate.is_set())
    @rule()
    def stall(self) -> None:
        self.service.device.gate.clear()

    @precondition(lambda self: not self.service.device.gate.is_set())
    @rule()
    def go_on(self) -> None:
        self.service.device.gate.set()
        self.settled()

    @invariant()
    def as_many_are_open(self) -> None:
        assert self.service.sequences.open == len(self.open)

    def teardown(self) -> None:
        self.service.device.gate.set()
        for request, expected in self.expected:
            outcome = request.outcome
            if isinstance(expected, str):
                assert outcome == expected, request.message
            else:
                assert outcome == "OK" and len(request.sent) == len(expected), request.message
                for number, shown in enumerate(expected):
                    assert request.sent[number] == {} if shown is None else request.shown(number) == shown
        self.service.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# ---------------------------------------------------------------------------------------------------------------------
# the real graphs


def test_what_is_served_equals_a_reenactor(tiny_bundle: Path, make: Any) -> None:
    bundle = Bundle.open(tiny_bundle)
    backend = open_backend("onnxruntime", bundle, threads=1)
    service = make(GraphFrames(backend, bundle, slots=5), sequences=4)
    size = service.streams.size
    pictures = np.random.default_rng(0).integers(0, 256, (6, size + 10, size, 3)).astype(np.uint8)
    square = np.stack([center_square(each, size) for each in pictures])
    ways: list[dict[str, Any]] = [{}, {"motion": "absolute"}, {"motion_scale": 0.5}, {"motion_scale": 2}]
    for id, options in enumerate(ways, 1):
        reenactor = Reenactor(bundle, backend, **options)
        reenactor.set_source(square[id])
        source = {"source_encoded": encoded(encode_image(pictures[id], "PNG"))}
        assert service.ask(id, source, start=True, **options).outcome == "OK"
        for frame in square[3:]:
            step = service.ask(id, {"frame": frame[None]})
            assert step.outcome == "OK" and (step.sent[0]["image"] == reenactor.drive(frame)).all()
        points = service.ask(id, {"frame": square[:1]}, wanted=POINTS)
        assert points.outcome == "OK" and (points.sent[0]["kp_value"] == reenactor.keypoints(square[0]).value).all()
