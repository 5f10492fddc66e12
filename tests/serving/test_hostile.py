"""What clients may do wrong, by mistake or on purpose: it is refused, nothing breaks, and no other sequence notices.

After everything, a witness asks for one more frame of its own sequence and compares it with the library's, pixel by
pixel. Requests are bare messages of the gRPC protocol, so that none is refused by a client library.
"""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagan_rt import Reenactor
from dagan_rt.bundle import Bundle
from dagan_rt.export.triton import write_repository
from dagan_rt.images import center_square, encode_image
from dagan_rt.serving.protocol import NEEDS_START
from dagan_rt.serving.repository import ServingPlan
from dagan_rt.serving.server import Server

pytestmark = pytest.mark.slow

SIZE, SEQUENCES, QUEUE, IDLE = 64, 6, 4, 1.5
PATIENCE = 30  # seconds after which a request counts as never answered
PICTURES = np.stack(
    [center_square(each, SIZE) for each in np.random.default_rng(0).integers(0, 256, (12, 9, 9, 3)).astype(np.uint8)]
)
JPEG, PNG, WEBP = (encode_image(PICTURES[3], kind) for kind in ("JPEG", "PNG", "WEBP"))
FRAME, SOURCE = PICTURES[1][None], PICTURES[2][None]


class Hostile:
    """A server, bare requests to it, and the witness."""

    WITNESS = 1

    def __init__(self, server: Server, bundle: Bundle) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self.server, self.messages, self.grpc = server, service_pb2, grpc
        self.channel = grpc.insecure_channel(server.grpc_url.split("://")[1])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        reenactor = Reenactor(bundle, "onnxruntime", threads=1)
        reenactor.set_source(PICTURES[0])
        self.expected = [reenactor.drive(frame) for frame in PICTURES[4:]]
        self.place = len(self.expected)
        self.seen = 0.0

    def request(self, id: Any = None, inputs: Any = (), start: bool = False, end: bool = False, model: str = "reenact",
                wanted: Any = (), **options: Any) -> Any:  # fmt: skip
        """inputs: name, datatype, shape, raw content; arrays by their own."""
        request = self.messages.ModelInferRequest(model_name=model)
        given = {"sequence_id": id, "sequence_start": start or None, "sequence_end": end or None, **options}
        for name, value in given.items():
            if value is not None:
                kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
                setattr(request.parameters[name], kind, value)
        for name, datatype, shape, content in inputs:
            request.inputs.add(name=name, datatype=datatype, shape=shape)
            request.raw_input_contents.append(content)
        for name in wanted:
            request.outputs.add(name=name)
        return request

    def ask(self, *args: Any, **options: Any) -> tuple[str, Any]:
        """Status, and the response or the message."""
        return self.send(self.request(*args, **options))

    def send(self, request: Any) -> tuple[str, Any]:
        try:
            return "OK", self.stub.ModelInfer(request, timeout=PATIENCE)
        except self.grpc.RpcError as error:
            return error.code().name, error.details()

    def stream(self, request: Any) -> list[str]:
        """What a decoupled model answers: a message each, empty where all went well."""
        call = self.stub.ModelStreamInfer(iter([request]), timeout=PATIENCE)
        try:
            return [each.error_message for each in call]
        except self.grpc.RpcError as error:
            return [f"{error.code().name} {error.details()}"]

    def start(self, id: Any, **options: Any) -> tuple[str, Any]:
        return self.ask(id, [raw("source", SOURCE)], start=True, **options)

    def step(self, id: Any, **options: Any) -> tuple[str, Any]:
        return self.ask(id, [raw("frame", FRAME)], **options)

    def end(self, id: Any) -> tuple[str, Any]:
        return self.ask(id, [("end", "BOOL", [1, 1], b"\1")], end=True)

    def witness(self) -> None:
        """One frame of a sequence that nobody else has any business with; it began long ago, unless it was idle."""
        assert self.server.intact
        idle = time.monotonic() - self.seen > 0.8 * IDLE
        if self.place == len(self.expected) or idle:
            begin = self.request(self.WITNESS, [raw("source", PICTURES[:1])], start=True, restart=True)
            status, answer = self.send(begin)
            patience = time.monotonic() + PATIENCE
            while idle and status == "UNAVAILABLE" and time.monotonic() < patience:  # others took its place meanwhile
                time.sleep(0.1)
                status, answer = self.send(begin)
            assert status == "OK", answer
            self.place = 0
        status, answer = self.ask(self.WITNESS, [raw("frame", PICTURES[4 + self.place][None])], wanted=["image"])
        assert status == "OK", answer
        image = np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(SIZE, SIZE, 3)
        assert (image == self.expected[self.place]).all()
        self.place, self.seen = self.place + 1, time.monotonic()

    def open(self) -> int:
        """How many sequences are open, by the metrics, which are up to a second old."""
        with urllib.request.urlopen(self.server.metrics_url, timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("dagan_sequences_open"))

    def alone(self) -> None:
        """Wait until the witness is the only one left."""
        fresh = time.monotonic() + 1.2
        until(lambda: time.monotonic() > fresh and self.open() == 1, self)


def raw(name: str, array: np.ndarray) -> tuple[str, str, list[int], bytes]:
    return name, "UINT8", list(array.shape), array.tobytes()


def file(name: str, data: bytes) -> tuple[str, str, list[int], bytes]:
    return name, "BYTES", [1, 1], struct.pack("<I", len(data)) + data


@pytest.fixture(scope="module")
def hostile(server_python: str, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    root, bundle = tmp_path_factory.mktemp("hostile") / "repository", Bundle.open(tiny_bundle)
    plan = ServingPlan(
        backend="onnxruntime", threads=1, stream=True, sequences=SEQUENCES, queue=QUEUE, idle=IDLE, warm_up=False
    )
    write_repository(bundle, root, plan)
    server = Server(root, server_python).start()
    yield Hostile(server, bundle)
    server.kill()


@pytest.fixture(autouse=True)
def nobody_else_notices(hostile: Hostile) -> Iterator[None]:
    hostile.witness()
    yield
    hostile.witness()


def until(condition: Callable[[], Any], hostile: Hostile) -> None:
    """Wait while the witness goes on."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "it never came about"
        hostile.witness()
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# the life of a sequence


def test_steps_starts_and_ends_out_of_order(hostile: Hostile) -> None:
    status, message = hostile.step(90)
    assert status == "INVALID_ARGUMENT" and NEEDS_START in message
    status, message = hostile.end(90)
    assert status == "INVALID_ARGUMENT" and NEEDS_START in message
    assert hostile.start(91)[0] == "OK"
    status, message = hostile.start(91)
    assert status == "ALREADY_EXISTS" and "restart" in message
    assert hostile.step(91)[0] == "OK"
    assert hostile.end(91)[0] == "OK"
    for again in (hostile.step(91), hostile.end(91)):
        assert again[0] == "INVALID_ARGUMENT" and NEEDS_START in again[1]
    assert hostile.ask(92, [raw("frame", FRAME)], start=True)[0] == "INVALID_ARGUMENT"
    status, message = hostile.step(92)
    assert status == "NOT_FOUND" and "send START" in message


@pytest.mark.parametrize("id", [0, "", None])
def test_no_sequence_id(hostile: Hostile, id: Any) -> None:
    for status, message in (hostile.start(id), hostile.step(id), hostile.end(id)):
        assert status == "INVALID_ARGUMENT" and "must specify a non-zero or non-empty correlation ID" in message


@pytest.mark.parametrize("id", ["0", "a b\n\"'\\{}", "ü" * 60, 2**63 - 1, -1])
def test_odd_sequence_ids_are_ids(hostile: Hostile, id: Any) -> None:
    assert [hostile.start(id)[0], hostile.step(id)[0], hostile.end(id)[0]] == ["OK"] * 3


def test_all_sequences_taken(hostile: Hostile) -> None:
    hostile.alone()
    opened = [hostile.start(100 + number)[0] for number in range(SEQUENCES)]
    assert opened == ["OK"] * (SEQUENCES - 1) + ["UNAVAILABLE"]  # the witness has one
    assert "all 6 sequences are open" in hostile.start(100 + SEQUENCES)[1]
    hostile.witness()
    assert hostile.end(100)[0] == "OK"
    assert hostile.start(100 + SEQUENCES)[0] == "OK"
    for number in range(1, SEQUENCES + 1):
        hostile.end(100 + number)


def test_too_long_idle(hostile: Hostile) -> None:
    assert hostile.start(110)[0] == hostile.start(111)[0] == "OK"
    hostile.alone()
    status, message = hostile.step(110)
    assert status == "NOT_FOUND" and "nothing came for 1.5 seconds" in message and "send START" in message
    assert hostile.start(110)[0] == "OK" and hostile.step(110)[0] == "OK"
    limit = time.monotonic() + IDLE + 5.5  # Triton forgets it later than the model
    until(lambda: time.monotonic() > limit, hostile)
    status, message = hostile.step(111)
    assert status == "INVALID_ARGUMENT" and NEEDS_START in message
    assert hostile.start(111)[0] == "OK" and hostile.end(111)[0] == "OK"


CLIENT = """
import sys, numpy as np, tritonclient.grpc as t
client = t.InferenceServerClient(sys.argv[1])
def tensor(name):
    given = t.InferInput(name, (1, 64, 64, 3), "UINT8")
    given.set_data_from_numpy(np.zeros((1, 64, 64, 3), np.uint8))
    return [given]
client.infer("reenact", tensor("source"), sequence_id=120, sequence_start=True)
client.start_stream(lambda result, error: print(flush=True))
while True:
    client.async_stream_infer("reenact", tensor("frame"), sequence_id=120)
    client.infer("reenact", tensor("frame"), sequence_id=120)
"""


def test_a_client_killed_in_midstream(hostile: Hostile) -> None:
    hostile.alone()
    address = hostile.server.grpc_url.split("://")[1]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, address], stdout=subprocess.PIPE)
    assert client.stdout and [client.stdout.readline() for _ in range(10)] == [b"\n"] * 10
    until(lambda: hostile.open() == 2, hostile)
    client.send_signal(signal.SIGKILL)
    assert client.wait(PATIENCE) == -signal.SIGKILL
    client.stdout.close()
    until(lambda: hostile.open() == 1, hostile)  # what it held is free
    assert hostile.step(120)[0] == "NOT_FOUND"


# ---------------------------------------------------------------------------------------------------------------------
# what requests hold


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_jpeg() -> bytes:
    """A JPEG whose header says 10000 x 10000."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", 10_000, 10_000) + JPEG[at + 9 :]


BOMB = zlib.compress(bytes(200_000_000), 9)  # of 200 kB
ROWS = b"".join(b"\0" + row.tobytes() for row in PICTURES[0])
WRONG: dict[str, tuple[Any, str]] = {
    "shape": (raw("frame", FRAME[:, :63]), "unexpected shape"),
    "rank": (raw("frame", FRAME[0]), "batch-size must be <= 32"),
    "batch": (raw("frame", PICTURES[:2]), "must specify batch-size 1"),
    "dtype": (("frame", "FP32", [1, SIZE, SIZE, 3], FRAME.astype(np.float32).tobytes()), "data-type"),
    "bytes missing": (("frame", "UINT8", [1, SIZE, SIZE, 3], bytes(100)), "size"),
    "overflowing shape": (("frame", "UINT8", [1, SIZE, SIZE, 2**62], b""), ""),
    "negative shape": (("frame", "UINT8", [1, SIZE, -SIZE, -3], FRAME.tobytes()), ""),
    "no image": (file("frame_encoded", b"hello"), "not an image this program reads"),
    "empty": (file("frame_encoded", b""), "got 0 bytes"),
    "length that lies": (("frame_encoded", "BYTES", [1, 1], struct.pack("<I", 2**31) + b"ab"), "incomplete string"),
    "two strings": (("frame_encoded", "BYTES", [1, 1], struct.pack("<IcIc", 1, b"a", 1, b"b")), "string elements"),
    "other formats": (file("frame_encoded", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"), "not an image"),
    "100-megapixel PNG": (file("frame_encoded", png(10_000, 10_000)), "too many pixels: 10000x10000"),
    "100-megapixel JPEG": (file("frame_encoded", huge_jpeg()), "too many pixels: 10000x10000"),
    "more pixels than numbers": (file("frame_encoded", png(2**31 - 1, 2**31 - 1)), "too many pixels"),
    "truncated JPEG": (file("frame_encoded", JPEG[: len(JPEG) * 2 // 3]), "damaged"),
    "truncated PNG": (file("frame_encoded", PNG[: len(PNG) * 2 // 3]), "damaged"),
    "truncated WebP": (file("frame_encoded", WEBP[: len(WEBP) // 2]), ""),
    "bomb of pixels": (file("frame_encoded", png(5000, 5000, bytes(75_005_000))), "too many pixels"),
    "bomb of text": (file("frame_encoded", png(SIZE, SIZE, ROWS, chunk(b"zTXt", b"a\0\0" + BOMB))), "damaged"),
    "bomb of scans": (file("frame_encoded", JPEG[:-2] + 5000 * b"\xff\xda\0\x08\1\1\0\0\x3f\0" + JPEG[-2:]), "scans"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs(hostile: Hostile, wrong: str) -> None:
    given, message = WRONG[wrong]
    assert hostile.start(130, restart=True)[0] == "OK"
    before = hostile.server.memory()
    status, told = hostile.ask(130, [given])
    assert (status, message in told) == ("INVALID_ARGUMENT", True), told
    name = given[0].replace("frame", "source")
    status, told = hostile.ask(131, [(name, *given[1:])], start=True)
    assert (status, message.replace("frame", "source") in told) == ("INVALID_ARGUMENT", True), told
    assert hostile.server.memory() < before + 100_000_000
    assert hostile.step(130)[0] == "OK"


def test_a_bomb_of_a_colour_profile_is_not_inflated(hostile: Hostile) -> None:
    """Profiles are not needed, so that the picture is fine."""
    before = hostile.server.memory()
    data = png(SIZE, SIZE, ROWS, chunk(b"iCCP", b"a\0\0" + BOMB))
    assert hostile.ask(132, [file("source_encoded", data)], start=True)[0] in ("OK", "INVALID_ARGUMENT")
    assert hostile.server.memory() < before + 100_000_000


def test_wrong_parameters(hostile: Hostile) -> None:
    assert hostile.start(140)[0] == "OK"
    for options in ({"speed": 1}, {"quality": 0}, {"quality": "9"}, {"encoding": "GIF"}, {'a"\n\\': True}, {"": 2.5}):
        assert hostile.step(140, **options)[0] == "INVALID_ARGUMENT", options
    assert hostile.step(140, wanted=["image", "secrets"])[0] == "INVALID_ARGUMENT"
    assert hostile.step(140)[0] == "OK"


def test_a_decoupled_request_beyond_the_queue(hostile: Hostile) -> None:
    many = [raw("source", SOURCE), raw("frame", np.repeat(FRAME, QUEUE + 1, 0))]
    answers = hostile.stream(hostile.request(150, many, start=True, model="reenact_stream", wanted=["image"]))
    assert len(answers) == 1 and "at most 4 frames" in answers[0]
    some = [many[0], raw("frame", np.repeat(FRAME, QUEUE, 0))]
    assert hostile.stream(hostile.request(150, some, start=True, model="reenact_stream", wanted=["image"])) == [""] * 4


def test_bodies_that_are_no_requests(hostile: Hostile) -> None:
    url = f"{hostile.server.http_url}/v2/models/reenact/infer"
    for body, length in ((b"", None), (b"{", None), (b"[]", None), (b"\xff" * 1000, "10"), (b"{}" + bytes(50), "-1")):
        headers = {"Inference-Header-Content-Length": length} if length else {}
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=PATIENCE)
        assert 400 <= error.value.code < 600
        error.value.close()


# ---------------------------------------------------------------------------------------------------------------------
# too much


def test_a_flood_beyond_the_queue(hostile: Hostile) -> None:
    """Hundreds of megabytes are thrown at one sequence by clients that wait for nothing; little of it stays."""
    noise = np.random.default_rng(1).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    flooding = hostile.request(160, [file("frame_encoded", encode_image(noise, "JPEG"))], wanted=["image"])
    assert flooding.ByteSize() > 100_000
    codes: Counter[str] = Counter()
    reasons: set[str] = set()
    window, counting = threading.Semaphore(200), threading.Lock()  # what Triton itself holds of one client's requests

    def flood(count: int) -> int:
        most = 0

        def come(call: Any) -> None:
            with counting:
                codes[call.code().name] += 1
                reasons.add((call.details() or "").split(" has ")[0])
            window.release()

        for number in range(count):
            window.acquire()
            hostile.stub.ModelInfer.future(flooding, timeout=PATIENCE).add_done_callback(come)
            if number % 100 == 0:
                most = max(most, hostile.server.memory())
                hostile.witness()
        return most

    assert hostile.start(160)[0] == "OK"
    before = flood(1000)
    most = flood(3000)
    until(lambda: codes.total() == 4000, hostile)
    assert set(codes) == {"OK", "UNAVAILABLE"} and codes["UNAVAILABLE"] > 1000 and codes["OK"] > 10
    assert reasons == {"", "sequence 160"}, reasons  # by the bound on what is taken, not by one further down
    assert most < before + 50_000_000, (before, most)
    status, message = hostile.step(160)
    assert status == "OK", message


def test_starts_without_an_end(hostile: Hostile) -> None:
    """More ids than there are places: they are refused, and places come back."""
    codes = Counter(hostile.start(1000 + number)[0] for number in range(300))
    assert set(codes) <= {"OK", "UNAVAILABLE"} and codes["UNAVAILABLE"] > 250
    until(lambda: hostile.start(1999)[0] == "OK", hostile)
    hostile.end(1999)


# ---------------------------------------------------------------------------------------------------------------------
# anything


def mutated(data: bytes, seed: int) -> bytes:
    """A file with a few bytes changed, cut or repeated."""
    chance, changed = random.Random(seed), bytearray(data)
    for _ in range(chance.randrange(8)):
        at = chance.randrange(len(changed))
        match chance.randrange(3):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                del changed[at : at + chance.randrange(50)]
            case 2:
                changed[at:at] = changed[max(0, at - chance.randrange(50)) : at]
        if not changed:
            break
    return bytes(changed)


FILES = st.builds(mutated, st.sampled_from((JPEG, PNG, WEBP)), st.integers(0, 2**32)) | st.binary(max_size=100)
ANY_INPUT = st.tuples(
    st.sampled_from(("frame", "source", "frame_encoded", "source_encoded", "end", "image", "other", "")),
    st.sampled_from(("UINT8", "BYTES", "BOOL", "FP32", "INT64", "FP16", "nothing")),
    st.lists(st.sampled_from((0, 1, 2, 3, SIZE, -1, 2**31, 2**62)), max_size=5),
    st.binary(max_size=40),
)
WANTED = ("image", "image_encoded", "kp_value", "kp_jacobian")
OPTIONS = {
    "motion": ("relative", "absolute"), "adapt_scale": (True, False), "encoding": ("JPEG", "PNG", "WEBP"),
    "quality": (1, 50, 95), "motion_scale": (0.0, 0.5, 4),
}  # fmt: skip
WRONG_OPTIONS = {
    "motion": ("", 3), "adapt_scale": ("yes",), "encoding": ("BMP", True), "quality": (0, 2**62, -1, "5", 1.5),
    "motion_scale": (4.5, -0.1, float("nan"), "1", True), "restart": (1,),
    "timeout": (1, 10**9, -1), "priority": (-1, 3), "else": (True,),
}  # fmt: skip


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    """One that could be right in most of its parts: what is wrong all over gets nowhere."""

    def rarely() -> bool:
        return bool(draw(st.integers(0, 9)) == 9)

    def picture(name: str) -> Any:
        if draw(st.booleans()):
            return raw(name, PICTURES[draw(st.integers(0, 9))][None])
        return file(f"{name}_encoded", draw(FILES))

    start = draw(st.booleans())
    inputs = [picture("source")] if start != rarely() else []
    if draw(st.booleans()) or not (inputs or rarely()):
        inputs.append(picture("frame"))
    if rarely():
        inputs.append(draw(ANY_INPUT))
    options = {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items() if draw(st.booleans())}
    if rarely():
        name = draw(st.sampled_from(tuple(WRONG_OPTIONS)))
        options[name] = draw(st.sampled_from(WRONG_OPTIONS[name]))
    wanted = draw(st.lists(st.sampled_from((*WANTED, "other") if rarely() else WANTED), max_size=3, unique=True))
    id = draw(st.sampled_from((2, "2", 2**63 - 1, 0, "", None) if rarely() else (2, 3)))
    more = {"restart": draw(st.booleans())} if start and "restart" not in options else {}
    return {
        "id": id, "inputs": inputs, "start": start, "end": rarely(), "wanted": wanted, **options, **more,
        "model": "reenact_stream" if rarely() else "reenact",
    }  # fmt: skip


@settings(
    max_examples=120, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(given=st.lists(requests(), min_size=1, max_size=6))
def test_any_requests(hostile: Hostile, given: Any) -> None:
    for request in given:
        if request["model"] == "reenact_stream":
            answers = hostile.stream(hostile.request(**request))
            assert not any(answer.startswith("DEADLINE_EXCEEDED") for answer in answers)
        else:
            status, message = hostile.ask(**request)
            assert status != "DEADLINE_EXCEEDED"
            assert status != "INTERNAL" or "Error: " not in message, message  # an exception that nobody foresaw
    hostile.witness()
