"""Sessions on a server: against a twin in this process, which can fail on purpose, and against the real one (slow)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest

from dagan_rt import InputError, Reenactor
from dagan_rt.errors import MissingPackage
from dagan_rt.images import encode_image
from dagan_rt.serving import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    ServerBusy,
    ServerUnavailable,
    SessionLost,
)
from dagan_rt.serving.direct import Direct


def _fake_server() -> ModuleType:
    path = Path(__file__).with_name("fake_server.py")
    spec = importlib.util.spec_from_file_location("dagan_rt_tests_fake_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = _fake_server()
SIZE, drive = fake.SIZE, fake.drive


def picture(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


SOURCE, OTHER = picture(100), picture(101)
FRAMES = [picture(seed) for seed in range(12)]


def expected(source: np.ndarray = SOURCE, frames: list[np.ndarray] = FRAMES) -> list[np.ndarray]:
    return [drive(source, frames[0], frame) for frame in frames]


def same(images: Any, others: list[np.ndarray]) -> bool:
    found = list(images)
    return len(found) == len(others) and all(map(np.array_equal, found, others))


@pytest.fixture
def twin() -> Iterator[Any]:
    with fake.serving(queue=4, sequences=3, idle=30) as started:
        yield started


@pytest.fixture
def client(twin: Any) -> Iterator[Client]:
    with Client(twin.url, timeout=5) as opened:
        yield opened


# ----------------------------------------------------------------------------------------------------------------------
# what a server has


def test_client_tells_what_the_server_has(client: Client) -> None:
    served = client.served
    assert (served.size, served.model, served.queue, served.many) == (SIZE, "reenact", 4, True)
    assert served.name == "dagan, fp32, bundle aaaaaaaaaaaa"
    assert "twin 1 at grpc://127.0.0.1:" in served.describe() and "fp32" in served.describe()


def test_nobody_at_the_address() -> None:
    for url in ("grpc://127.0.0.1:1", "http://127.0.0.1:1"):
        with pytest.raises(ServerUnavailable, match=f"no server answers at {url}"):
            Client(url, timeout=5)


def test_a_server_without_the_model_and_one_of_something_else(twin: Any) -> None:
    with pytest.raises(InputError, match="has no model 'nope': it has other, reenact, reenact_stream"):
        Client(twin.url, model="nope")
    with pytest.raises(InputError, match="the model other of the server at .* is none of dagan-rt"):
        twin.models.add("other")
        Client(twin.url, model="other")


def test_a_model_that_could_not_be_loaded(twin: Any) -> None:
    twin.models.remove("reenact")
    twin.unloaded["reenact"] = "its bundle is damaged"
    with pytest.raises(ServerUnavailable, match="could not load reenact: its bundle is damaged"):
        Client(twin.url)


def test_without_tritonclient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    with pytest.raises(MissingPackage, match=r"pip install 'dagan-rt\[triton\]'"):
        Client("grpc://127.0.0.1:1")


@pytest.mark.parametrize("url", ["host:8001", "ftp://host", "grpc://", "grpc://host/path", "grpc://u@h", "grpc://h:x"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="server"):
        Client(url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"motion": "sideways"}, "motion must be"),
        ({"motion": "absolute", "adapt_scale": True}, "adapt_scale"),
        ({"motion_scale": -0.1}, "^motion_scale must be 0 to 4, got -0.1"),
        ({"motion": "absolute", "motion_scale": 0.5}, "^motion_scale scales relative motion"),
        ({"encoding": "GIF"}, "encoding must be one of JPEG, PNG, WEBP, got 'GIF'"),
        ({"quality": 0}, "quality must be 1 to 95, got 0"),
        ({"ahead": 0}, "ahead must be 1 to 1024, got 0"),
        ({"timeout": 0.0}, "timeout must be more than 0 seconds, got 0"),
    ],
)
def test_arguments_of_open(client: Client, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        client.open(SOURCE, **arguments)


# ----------------------------------------------------------------------------------------------------------------------
# frames


@pytest.mark.parametrize("shared", [True, False])
def test_images_in_every_form(twin: Any, shared: bool) -> None:
    with Client(twin.url, timeout=5, shared_memory=shared) as client, client.open(SOURCE) as session:
        assert bool(twin.regions) == shared
        assert same([session.drive(frame) for frame in FRAMES], expected())
        assert same(session.stream(FRAMES), expected())
        assert same(session.drive_many(FRAMES), expected())
        pending = [session.submit(frame) for frame in FRAMES[: session.ahead]]
        assert same((each.result()[0] for each in pending), expected()[: session.ahead])
        assert all(each.done() for each in pending)
    assert not twin.regions
    assert fake.eventually(lambda: not any(sequences.open for sequences in twin.sequences.values()))


def test_motion_and_scales_reach_the_server(client: Client) -> None:
    with client.open(SOURCE, motion="absolute") as session:
        assert same(map(session.drive, FRAMES[:3]), [drive(SOURCE, None, frame) for frame in FRAMES[:3]])
    with client.open(SOURCE, adapt_scale=True) as session:
        assert same(map(session.drive, FRAMES[:3]), [drive(SOURCE, FRAMES[0], frame, 2) for frame in FRAMES[:3]])
    with client.open(SOURCE, adapt_scale=True, motion_scale=0.25) as session:
        calmer = [drive(SOURCE, FRAMES[0], frame, 0.5) for frame in FRAMES[:3]]
        assert same(map(session.drive, FRAMES[:3]), calmer)
        session.reset()
        assert same(map(session.drive, FRAMES[:3]), calmer)
        assert same(session.drive_many(FRAMES[:3]), calmer)


def test_an_older_server_serves_all_but_a_motion_scale(
    twin: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = twin._take

    def older(request: Any, context: Any, many: bool) -> Any:
        if "motion_scale" in request.parameters:
            known = "motion, adapt_scale, restart, encoding, quality"
            refusal = f"parameter must be one of {known}, got 'motion_scale'"  # as it says so
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, refusal)
        return take(request, context, many)

    monkeypatch.setattr(twin, "_take", older)
    with pytest.raises(InputError, match=r"server at grpc://\S+ has an older dagan-rt .* got 'motion_scale'$"):
        client.open(SOURCE, motion_scale=0.5)
    with client.open(SOURCE, motion_scale=1) as session:
        assert same(map(session.drive, FRAMES), expected())


def test_files_travel_in_place_of_arrays(client: Client) -> None:
    files = [encode_image(frame, "PNG") for frame in FRAMES]
    with client.open(encode_image(SOURCE, "PNG")) as session:
        assert same(map(session.drive, files), expected())
        assert same(session.drive_many([files[0], *FRAMES[1:]]), expected())
    with client.open(SOURCE, encoding="PNG") as session:
        assert same(session.stream(FRAMES), expected())
        assert same(session.drive_many(FRAMES), expected())
    smooth = [np.full((SIZE, SIZE, 3), level, np.uint8) for level in (10, 12, 14)]
    with client.open(np.zeros_like(SOURCE), encoding="JPEG", quality=90) as session:
        for image, right in zip(session.stream(smooth), expected(np.zeros_like(SOURCE), smooth), strict=True):
            assert np.abs(image.astype(int) - right).max() <= 8


def test_source_reset_and_key_points(client: Client) -> None:
    with client.open(SOURCE) as session:
        assert session.keypoints(FRAMES[5]).value[0, 0, 0] == pytest.approx(FRAMES[5].mean())
        session.drive(FRAMES[0])  # asking for key points has begun nothing
        assert np.array_equal(session.drive(FRAMES[1]), drive(SOURCE, FRAMES[0], FRAMES[1]))
        session.reset()
        assert same(map(session.drive, FRAMES[3:6]), expected(SOURCE, FRAMES[3:6]))
        session.set_source(OTHER)
        assert same(map(session.drive, FRAMES[2:5]), expected(OTHER, FRAMES[2:5]))
        with pytest.raises(InputError, match="source_encoded is not an image"):
            session.set_source(b"no file of an image")
        assert np.array_equal(session.drive(FRAMES[7]), drive(OTHER, FRAMES[2], FRAMES[7]))  # the former stays


def test_a_frame_under_way_keeps_its_source(twin: Any, client: Client) -> None:
    with client.open(SOURCE) as session:
        session.drive(FRAMES[0])
        twin.frames.gate.clear()
        twin.lost.append(True)  # it has to be sent twice
        pending = [session.submit(frame) for frame in FRAMES[1:3]]
        changing = threading.Thread(target=session.set_source, args=(OTHER,))
        changing.start()
        time.sleep(0.05)
        twin.frames.gate.set()
        assert same((each.result()[0] for each in pending), expected()[1:3])
        changing.join()
        assert np.array_equal(session.drive(FRAMES[4]), drive(OTHER, FRAMES[4], FRAMES[4]))
        assert twin.sequences["reenact"].open == 1


@pytest.mark.parametrize(
    "frame", [FRAMES[0].astype(np.float32), FRAMES[0][:5], "text", b"", b"no image"], ids=lambda frame: str(type(frame))
)
def test_frames_that_are_none(client: Client, frame: Any) -> None:
    with client.open(SOURCE) as session:
        with pytest.raises(InputError, match="frame"):
            session.drive(frame)
        assert same(map(session.drive, FRAMES), expected())  # it has not become the initial one


def test_closed_sessions_and_clients(twin: Any) -> None:
    client = Client(twin.url)
    session = client.open(SOURCE)
    other = client.open(SOURCE)
    session.close()
    session.close()
    for use in (lambda: session.drive(FRAMES[0]), session.reset, lambda: session.keypoints(SOURCE)):
        with pytest.raises(InputError, match="closed"):
            use()
    client.close()
    client.close()
    with pytest.raises(InputError):
        other.drive(FRAMES[0])
    with pytest.raises(InputError, match="not connected"):
        client.open(SOURCE)


def test_asyncio(twin: Any) -> None:
    async def use() -> None:
        async with AsyncClient(twin.url, timeout=5) as client:
            first, second = await asyncio.gather(client.open(SOURCE), client.open(OTHER))
            tasks = [session.drive(frame) for frame in FRAMES for session in (first, second)]
            images = await asyncio.gather(*tasks)
            assert same(images[::2], expected()) and same(images[1::2], expected(OTHER))
            assert same([image async for image in first.stream(FRAMES)], expected())
            assert same([image async for image in second.drive_many(FRAMES)], expected(OTHER))

    asyncio.run(use())


def test_abandoned_clients_end_nothing(twin: Any) -> None:
    async def use() -> None:
        client = await AsyncClient(twin.url).connect()
        session = await client.open(SOURCE)
        await session.drive(FRAMES[0])
        assert session.starts == 1
        await session.reset()
        assert session.starts == 2
        await client.abandon()
        with pytest.raises(InputError):
            await session.drive(FRAMES[1])

    asyncio.run(use())
    assert twin.sequences["reenact"].open == 1 and len(twin.regions) == 1
    assert sum(call[3] for call in twin.calls) == 1  # of the reset


# ----------------------------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize("shared", [True, False])
def test_a_server_that_restarts(twin: Any, shared: bool) -> None:
    with Client(twin.url, timeout=10, shared_memory=shared) as client, client.open(SOURCE) as session:
        assert same(map(session.drive, FRAMES[:3]), expected()[:3])
        twin.frames.gate.clear()
        pending = [session.submit(frame) for frame in FRAMES[3:6]]
        time.sleep(0.05)
        twin.stop()
        twin.start()
        assert same((each.result()[0] for each in pending), expected()[3:6])
        assert same(map(session.drive, FRAMES[6:]), expected()[6:])  # the motion did not jump
        assert same(session.drive_many(FRAMES), expected())
        assert bool(twin.regions) == shared
    assert len(twin.starts) == 3  # open, once for all after the restart, and the chunks' own


def test_video_in_chunks_goes_on_after_a_restart(client: Client, twin: Any) -> None:
    for began in (False, True):  # with the first of the frames as the initial one, and with the session's
        with client.open(SOURCE) as session:
            if began:
                session.drive(FRAMES[5])
            images = session.drive_many(FRAMES)
            found = [next(images), next(images)]
            twin.stop()
            twin.start()
            first = FRAMES[5] if began else FRAMES[0]
            assert same([*found, *images], [drive(SOURCE, first, frame) for frame in FRAMES])


def test_a_session_whose_time_was_up(client: Client, twin: Any) -> None:
    with client.open(SOURCE) as session:
        session.drive(FRAMES[0])
        id = twin.calls[0][1]
        for known in (True, False):  # as the model says it, and as Triton does
            twin.sequences["reenact"]._open.clear()
            if not known:
                twin._known.clear()
            assert np.array_equal(session.drive(FRAMES[4]), expected()[4])
        assert [call[1:] for call in twin.starts] == [(id, True, False, False), *2 * [(id, True, False, True)]]


def test_an_answer_that_is_lost_is_asked_for_again(client: Client, twin: Any) -> None:
    with client.open(SOURCE) as session:
        twin.lost.extend([True, False, True])
        assert same(map(session.drive, FRAMES[:3]), expected()[:3])


def test_a_server_that_always_forgets(client: Client, twin: Any) -> None:
    with client.open(SOURCE) as session:
        session.drive(FRAMES[0])
        twin.faults.extend(
            [lambda context: context.abort(grpc.StatusCode.NOT_FOUND, "sequence 1 is not open here")] * 7
        )
        with pytest.raises(SessionLost, match="lost the session 6 times"):
            session.drive(FRAMES[1])
        assert np.array_equal(session.drive(FRAMES[1]), expected()[1])


def test_a_full_server_is_waited_for(client: Client, twin: Any) -> None:
    with ExitStack() as stack:
        sessions = [stack.enter_context(client.open(OTHER)) for _ in range(3)]
        with pytest.raises(ServerBusy, match="all 3 sequences are open"):
            client.open(SOURCE, timeout=0.2)
        threading.Timer(0.1, sessions[0].close).start()
        with client.open(SOURCE) as session:  # once there is room
            sessions[1].set_source(SOURCE)  # which needs none
            assert same(map(session.drive, FRAMES), expected())


def test_what_is_busy_and_what_is_gone(client: Client, twin: Any) -> None:
    with client.open(SOURCE) as session:
        session.drive(FRAMES[0])
        full = lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "sequence 1 has no room")  # noqa: E731
        twin.faults.extend([full] * 2)
        assert np.array_equal(session.drive(FRAMES[1]), expected()[1])
        twin.faults.extend([full] * 50)
        with pytest.raises(ServerBusy, match="had no room until the deadline: sequence 1 has no room"):
            session.drive(FRAMES[1], timeout=0.2)
        twin.faults.clear()
        twin.stop()
        try:
            with pytest.raises(ServerUnavailable, match="does not serve any more"):
                session.drive(FRAMES[1], timeout=0.3)
        finally:
            twin.start()


def test_the_shortest_way_is_taken_and_left(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    drive_directly = Direct.drive

    def watched(self: Direct, frame: np.ndarray, timeout: float) -> np.ndarray | None:
        image = drive_directly(self, frame, timeout)
        taken.append(image is not None)
        return image

    monkeypatch.setattr(Direct, "drive", watched)
    with Client(twin.url, timeout=5, shared_memory=True) as client, client.open(SOURCE) as session:
        assert same(map(session.drive, FRAMES), expected())
        assert taken == [False] + [True] * (len(FRAMES) - 1)  # the first frame begins the motion
        session.set_source(OTHER)
        assert same(map(session.drive, FRAMES), expected(OTHER))
        assert taken[len(FRAMES) :] == taken[: len(FRAMES)]
        twin.faults.append(lambda context: context.abort(grpc.StatusCode.NOT_FOUND, "sequence 1 is not open here"))
        taken.clear()
        assert same(map(session.drive, FRAMES), expected(OTHER))
        assert taken == [False] + [True] * (len(FRAMES) - 1)  # the loop sees to it
        with pytest.raises(InputError, match="frame must be uint8"):
            session.drive(FRAMES[0][:2])
        assert np.array_equal(session.drive(FRAMES[1]), expected(OTHER)[1]) and taken[-1]
    with pytest.raises(InputError, match="closed"):
        session.drive(FRAMES[0])
    taken.clear()
    for arguments in ({"shared_memory": False}, {"shared_memory": True, "encoding": "PNG"}):
        encoding = arguments.pop("encoding", None)
        with Client(twin.url, **arguments) as client, client.open(SOURCE, encoding=encoding) as session:
            assert same(map(session.drive, FRAMES), expected())
    assert not taken


def test_both_ways_side_by_side(twin: Any) -> None:
    with Client(twin.url, timeout=5, shared_memory=True) as client:
        with client.open(SOURCE, ahead=2) as session:
            session.drive(FRAMES[0])
            with ThreadPoolExecutor(1) as thread:
                streamed = thread.submit(lambda: same(session.stream(FRAMES * 8), expected() * 8))
                assert same(map(session.drive, FRAMES[::-1] * 8), expected()[::-1] * 8)
                assert streamed.result(timeout=20)
        session = client.open(SOURCE)
        session.drive(FRAMES[0])
    with pytest.raises(InputError, match="closed"):
        session.drive(FRAMES[1])  # the client ended it


@pytest.mark.parametrize("shared", [True, False])
def test_a_deadline_and_the_late_answer(twin: Any, shared: bool) -> None:
    with Client(twin.url, shared_memory=shared) as client, client.open(SOURCE, ahead=1) as session:
        session.drive(FRAMES[0])
        twin.frames.gate.clear()
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="gave no answer within 0.15 seconds"):
            session.drive(FRAMES[1], timeout=0.15)
        assert 0.1 < time.monotonic() - begun < 1.5
        for frame in FRAMES[2:4]:
            with pytest.raises(DeadlineExceeded):
                session.drive(frame, timeout=0.15)
        sent = sum(not call[2] for call in twin.calls)
        assert sent == (3 if shared else 4)  # its memory is not used again before the server is through with it
        pending = session.submit(FRAMES[2])
        twin.frames.gate.set()
        assert np.array_equal(pending.result()[0], expected()[2])
        assert same(session.stream(FRAMES), expected())  # the late image went nowhere


def test_a_first_frame_without_an_answer_begins_nothing(client: Client, twin: Any) -> None:
    with client.open(SOURCE) as session:
        twin.frames.gate.clear()
        with pytest.raises(DeadlineExceeded):
            session.drive(FRAMES[0], timeout=0.1)
        twin.frames.gate.set()
        assert same(map(session.drive, FRAMES[1:]), expected(SOURCE, FRAMES[1:]))
    assert len({call[1] for call in twin.starts}) == 2


def test_backpressure(client: Client, twin: Any) -> None:
    with client.open(SOURCE, ahead=99) as session:
        assert session.ahead == 4  # the server's queue
        session.drive(FRAMES[0])
        twin.frames.gate.clear()
        pending = [session.submit(frame) for frame in FRAMES[:4]]
        with pytest.raises(DeadlineExceeded, match="4 frames under way"):
            session.submit(FRAMES[4], timeout=0.1)
        twin.frames.gate.set()
        assert same((each.result()[0] for each in pending), expected()[:4])
        assert not any(sequences.refused for sequences in twin.sequences.values())


def test_memory_that_cannot_be_shared(twin: Any) -> None:
    twin.shares = False
    with Client(twin.url) as client, client.open(SOURCE) as session:
        assert same(session.stream(FRAMES), expected()) and not twin.regions
    with Client(twin.url, shared_memory=True) as client, pytest.raises(InputError, match="cannot share memory"):
        client.open(SOURCE)
    with Client(twin.url, shared_memory="cuda") as client, pytest.raises(InputError, match="cuda-python|of the GPU"):
        client.open(SOURCE)
    with pytest.raises(InputError, match="shared_memory must be"):
        Client(twin.url, shared_memory="perhaps")


def test_memory_leaves_no_name(twin: Any) -> None:
    before = set(os.listdir("/dev/shm"))
    with Client(twin.url) as client, client.open(SOURCE):
        assert twin.regions and not {name for name in set(os.listdir("/dev/shm")) - before if "dagan_rt" in name}


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, dagan_rt.serving as s; assert 'numpy' not in sys.modules; s.Client; print(sorted(dir(s))[:2])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "AsyncClient" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# the real server


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Path) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """A source, frames, and the images that a Reenactor makes of them."""
    source, frames = picture(1, 64), [picture(seed, 64) for seed in range(10, 22)]
    with Reenactor(tiny_bundle, backend="onnxruntime", threads=1) as reenactor:
        reenactor.set_source(source)
        return source, frames, [reenactor.drive(frame) for frame in frames]


@pytest.fixture(scope="module")
def real(server_python: str, make_repository: Callable[..., Path]) -> Iterator[Any]:
    from dagan_rt.serving.server import Server

    started = Server(make_repository(backend="onnxruntime", threads=1, idle=1.0, queue=6), server_python).start()
    yield started
    started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_real_images_equal_the_library_s(real: Any, wanted: Any, protocol: str, shared: bool) -> None:
    source, frames, images = wanted
    with Client(getattr(real, f"{protocol}_url"), shared_memory=shared) as client:
        with client.open(source) as session:
            assert same(map(session.drive, frames), images)
            assert same(session.stream(frames), images)
            if protocol == "grpc":
                assert same(session.drive_many(frames), images)
            if protocol == "grpc" and shared:
                time.sleep(2.5)  # its time is up
                assert same(map(session.drive, frames[:2]), images[:2])
        with client.open(encode_image(source, "PNG"), encoding="PNG") as session:
            assert same(session.stream(frames), images)
        with client.open(source, encoding="JPEG") as session:
            distance = [np.abs(a.astype(int) - b).mean() for a, b in zip(session.stream(frames), images, strict=True)]
            assert max(distance) < 4


@pytest.mark.slow
def test_real_asyncio_over_both(real: Any, wanted: Any) -> None:
    source, frames, images = wanted

    async def use(url: str) -> None:
        async with AsyncClient(url) as client:
            session = await client.open(source)
            assert same(await asyncio.gather(*map(session.drive, frames)), images)

    for url in (real.grpc_url, real.http_url):
        asyncio.run(use(url))


@pytest.mark.slow
def test_a_killed_client_leaves_nothing(real: Any, wanted: Any) -> None:
    code = f"""
import numpy as np, os, signal
from dagan_rt.serving import Client
session = Client({real.grpc_url!r}, shared_memory=True).open(np.zeros((64, 64, 3), np.uint8))
session.drive(np.zeros((64, 64, 3), np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = {name for name in os.listdir("/dev/shm") if "dagan_rt" in name}
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert {name for name in os.listdir("/dev/shm") if "dagan_rt" in name} <= before


@pytest.mark.slow
def test_real_server_dies_and_comes_back(real: Any, wanted: Any) -> None:
    source, frames, images = wanted
    with Client(real.grpc_url, timeout=60) as grpc, Client(real.http_url, timeout=60) as http:
        with grpc.open(source) as first, http.open(source) as second:
            for session in (first, second):
                assert np.array_equal(session.drive(frames[0]), images[0])
            pending = [(session.submit(frame), image) for frame, image in zip(frames[1:4], images[1:4], strict=True)
                       for session in (first, second)]  # fmt: skip
            real.kill()
            real.start()
            assert all(np.array_equal(each.result()[0], image) for each, image in pending)
            for session in (first, second):
                assert same(session.stream(frames[4:]), images[4:])
        real.kill()
        with pytest.raises(ServerUnavailable, match="does not serve any more|no server"):
            grpc.open(source, timeout=0.5)
