"""The exported repository in a real tritonserver, asked by a bare tritonclient, compared with the library itself."""

from __future__ import annotations

import json
import queue
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dagan_rt import Reenactor
from dagan_rt.backends import open_backend
from dagan_rt.bundle import Bundle
from dagan_rt.export.triton import write_repository
from dagan_rt.images import center_square, decode_image, encode_image
from dagan_rt.serving.repository import ServingPlan
from dagan_rt.serving.server import Server

pytestmark = pytest.mark.slow

SIZE = 64
PROTOCOLS = ("grpc", "http")
POINTS = ("kp_value", "kp_jacobian")
PATIENCE = 60


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def server(server_python: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The default repository, as exported."""
    root = tmp_path_factory.mktemp("real") / "repository"
    write_repository(bundle, root, ServingPlan(backend="onnxruntime", threads=1, stream=True))
    started = Server(root, server_python).start()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Callable[..., list[np.ndarray]]:
    """`reference(source, frames, **options of Reenactor)`: what the library makes of a clip, in this process."""
    backend = open_backend("onnxruntime", bundle, threads=1)

    def drive(source: np.ndarray, frames: Any, **options: Any) -> list[np.ndarray]:
        reenactor = Reenactor(bundle, backend, **options)
        reenactor.set_source(source)
        return [reenactor.drive(frame) for frame in frames]

    return drive


def client_module(protocol: str) -> ModuleType:
    if protocol == "grpc":
        import tritonclient.grpc as module
    else:
        import tritonclient.http as module
    return module


def connect(server: Server, protocol: str) -> Any:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    more = {} if protocol == "grpc" else {"network_timeout": PATIENCE}
    return client_module(protocol).InferenceServerClient(url.split("://")[1], **more)


def tensors(module: ModuleType, arrays: dict[str, np.ndarray]) -> list[Any]:
    given = []
    for name, array in arrays.items():
        kind = {"uint8": "UINT8", "bool": "BOOL"}.get(str(array.dtype), "BYTES")
        given.append(module.InferInput(name, array.shape, kind))
        given[-1].set_data_from_numpy(array)
    return given


class Sequence:
    """Bare requests of one sequence."""

    def __init__(self, server: Server, protocol: str, id: int | str) -> None:
        self.module, self.client, self.id = client_module(protocol), connect(server, protocol), id

    def ask(self, wanted: Any = ("image",), start: bool = False, end: bool = False, parameters: Any = None,
            **arrays: np.ndarray) -> Any:  # fmt: skip
        outputs = [self.module.InferRequestedOutput(name) for name in wanted]
        return self.client.infer(
            "reenact", tensors(self.module, arrays), outputs=outputs or None, sequence_id=self.id,
            sequence_start=start, sequence_end=end, parameters=parameters,
        )  # fmt: skip

    def start(self, source: np.ndarray, **parameters: Any) -> Any:
        return self.ask((), start=True, source=source[None], parameters=parameters or None)

    def drive(self, frame: np.ndarray) -> np.ndarray:
        return self.ask(frame=frame[None]).as_numpy("image")[0]

    def end(self) -> None:
        given = tensors(self.module, {"end": np.ones((1, 1), bool)})
        self.client.infer("reenact", given, sequence_id=self.id, sequence_end=True)
        self.client.close()


def pictures(seed: int, count: int) -> np.ndarray:
    """Smooth ones, as a photograph is: [count, 64, 64, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 9, 9, 3)).astype(np.uint8)
    return np.stack([center_square(each, SIZE) for each in coarse])


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(server.http_url + path, timeout=PATIENCE) as answer:
        return json.loads(answer.read())


def metrics(server: Server) -> dict[str, float]:
    """Those of this project, by name, summed over models."""
    with urllib.request.urlopen(server.metrics_url, timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("dagan_"):
            assert 'instance="reenact' in line and 'model="reenact' in line
            name = line.split("{")[0]
            found[name] = found.get(name, 0.0) + float(line.split()[-1])
    return found


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_health_and_metadata(server: Server, protocol: str, bundle: Bundle) -> None:
    client = connect(server, protocol)
    assert client.is_server_live() and client.is_server_ready()
    options = {"as_json": True} if protocol == "grpc" else {}
    for name, lead in (("reenact", "-1"), ("reenact_stream", "1")):
        assert client.is_model_ready(name)
        known = client.get_model_metadata(name, **options)
        assert known["name"] == name and known["platform"] == "python"
        inputs = {each["name"]: [str(side) for side in each["shape"]] for each in known["inputs"]}
        outputs = {each["name"]: [str(side) for side in each["shape"]] for each in known["outputs"]}
        assert set(inputs) == {"frame", "source", "frame_encoded", "source_encoded", "end"}
        assert inputs["frame"] == ["-1", "64", "64", "3"]
        assert outputs["image"] == [lead, "64", "64", "3"] and outputs["kp_value"] == [lead, "15", "2"]
    assert get(server, "/v2/models/reenact/config")["parameters"]["size"]["string_value"] == "64"
    client.close()


def within(written: Any, served: Any) -> bool:
    """Whether all that was written is served; the server adds defaults."""
    if isinstance(written, dict):
        return isinstance(served, dict) and all(
            name in served and within(of, served[name]) for name, of in written.items()
        )
    if isinstance(written, list):
        return isinstance(served, list) and len(written) == len(served) and all(map(within, written, served))
    return bool(written == served)


@pytest.mark.parametrize("name", ["reenact", "reenact_stream"])
def test_the_written_configuration_is_the_served_one(server: Server, name: str) -> None:
    from google.protobuf import json_format, text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    written = text_format.Parse((Path(server.repository) / name / "config.pbtxt").read_text(), ModelConfig())
    client = connect(server, "grpc")
    served = client.get_model_config(name).config
    options = {"preserving_proto_field_name": True}
    wanted, got = (json_format.MessageToDict(each, **options) for each in (written, served))
    assert within(wanted, got), (wanted, got)
    assert got["backend"] == "python" and not served.response_cache.enable
    assert served.sequence_batching.oldest.max_candidate_sequences >= 64
    assert served.model_transaction_policy.decoupled == (name == "reenact_stream")
    changed = ModelConfig()
    changed.CopyFrom(written)
    changed.parameters["queue"].string_value = "7"
    assert not within(json_format.MessageToDict(changed, **options), got)
    client.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "options",
    [{"motion": "relative"}, {"motion": "absolute"}, {"motion_scale": 0.7}, {"motion_scale": 2, "adapt_scale": True}],
    ids=["relative", "absolute", "calmer", "exaggerated"],
)
def test_a_clip_equals_the_library_s_pixel_by_pixel(
    server: Server, protocol: str, options: dict[str, Any], reference: Any
) -> None:
    source, frames = pictures(1, 1)[0], pictures(2, 8)
    sequence = Sequence(server, protocol, 11 if protocol == "grpc" else "eleven")
    sequence.start(source, **options)
    expected = reference(source, frames, **options)
    for frame, image in zip(frames, expected, strict=True):
        assert (sequence.drive(frame) == image).all()
    sequence.end()
    assert len({image.tobytes() for image in expected}) == len(frames)  # the frames do make a difference


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_eight_interleaved_sequences_never_mix(server: Server, protocol: str, reference: Any) -> None:
    count, length = 8, 12
    sources = pictures(3, count)
    clips = [pictures(10 + number, length) for number in range(count)]
    expected = [reference(source, clip) for source, clip in zip(sources, clips, strict=True)]
    assert len({image.tobytes() for clip in expected for image in clip}) == count * length
    before = get(server, "/v2/models/reenact/stats")["model_stats"][0]
    wrong: list[Any] = []
    together = threading.Barrier(count)

    def play(number: int) -> None:
        try:
            sequence = Sequence(server, protocol, 100 + number)
            sequence.start(sources[number])
            together.wait(PATIENCE)
            for place, (frame, image) in enumerate(zip(clips[number], expected[number], strict=True)):
                if not (sequence.drive(frame) == image).all():
                    wrong.append((number, place))
            sequence.end()
        except Exception as error:
            wrong.append((number, error))
            together.abort()

    players = [threading.Thread(target=play, args=(number,)) for number in range(count)]
    for player in players:
        player.start()
    for player in players:
        player.join(PATIENCE)
    assert wrong == []
    after = get(server, "/v2/models/reenact/stats")["model_stats"][0]
    inferences, executions = (after[name] - before[name] for name in ("inference_count", "execution_count"))
    assert inferences == count * (length + 2)
    assert executions < inferences  # requests of several sequences came to the model together
    sizes = {each["batch_size"] for each in after["batch_stats"]}
    assert max(sizes) > 1, sizes


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
def test_encoded_in_and_out(server: Server, protocol: str, encoding: str, reference: Any) -> None:
    def file(image: np.ndarray) -> np.ndarray:
        return np.array([[encode_image(image, encoding)]], object)

    def seen(array: np.ndarray) -> np.ndarray:
        return center_square(decode_image(array[0, 0], "it"), SIZE)

    wide = np.random.default_rng(5).integers(0, 256, (3, 9, 12, 3)).astype(np.uint8)
    files = [file(np.repeat(np.repeat(each, 11, 0), 11, 1)) for each in wide]  # 99 x 132 pixels
    sequence = Sequence(server, protocol, 21)
    sequence.ask((), start=True, source_encoded=files[0])
    for given, image in zip(files[1:], reference(seen(files[0]), map(seen, files[1:])), strict=True):
        options = {"encoding": encoding, "quality": 90}
        answer = sequence.ask(("image", "image_encoded"), frame_encoded=given, parameters=options)
        assert (answer.as_numpy("image")[0] == image).all()
        assert answer.as_numpy("image_encoded").shape == (1, 1)
        assert answer.as_numpy("image_encoded")[0, 0] == encode_image(image, encoding, 90)
    alone = sequence.ask(("image_encoded",), frame_encoded=files[2])
    assert (decode_image(alone.as_numpy("image_encoded")[0, 0], "it", ("PNG",)) == image).all()
    sequence.end()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_key_points_alone(server: Server, protocol: str, bundle: Bundle) -> None:
    source, frame = pictures(6, 2)
    reenactor = Reenactor(bundle, "onnxruntime", threads=1)
    sequence = Sequence(server, protocol, 31)
    sequence.start(source)
    answer = sequence.ask(POINTS, frame=frame[None])
    for name, expected in zip(POINTS, reenactor.keypoints(frame), strict=True):
        assert (answer.as_numpy(name) == expected).all()
    assert answer.as_numpy("image") is None
    sequence.end()


def test_a_decoupled_request_streams_its_answers(server: Server, reference: Any) -> None:
    import tritonclient.grpc as module

    source, frames = pictures(7, 1)[0], pictures(8, 6)
    answers: queue.Queue[Any] = queue.Queue()
    client = connect(server, "grpc")
    client.start_stream(lambda result, error: answers.put((result, error)))
    outputs = [module.InferRequestedOutput("image")]

    def send(id: str, arrays: dict[str, np.ndarray], **flags: bool) -> None:
        client.async_stream_infer(
            "reenact_stream", tensors(module, arrays), outputs=outputs, sequence_id=41, request_id=id, **flags
        )

    send("a", {"source": source[None], "frame": frames[:4]}, sequence_start=True)
    got: list[np.ndarray] = []
    ids: list[str] = []
    finals: list[bool] = []

    def receive(count: int) -> None:
        for _ in range(count):
            result, error = answers.get(timeout=PATIENCE)
            assert error is None, error
            got.append(result.as_numpy("image")[0])
            ids.append(result.get_response().id)
            finals.append(result.get_response().parameters["triton_final_response"].bool_param)

    receive(4)
    send("b", {"frame": frames[4:]}, sequence_end=True)
    receive(2)
    assert ids == ["a"] * 4 + ["b"] * 2 and finals == [False, False, False, True, False, True]
    for image, expected in zip(got, reference(source, frames), strict=True):
        assert (image == expected).all()
    send("c", {"frame": frames[:1]})
    _, error = answers.get(timeout=PATIENCE)
    assert "must specify the START flag" in str(error)
    client.stop_stream()
    client.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_system_shared_memory_holds_frames_and_images(server: Server, protocol: str, reference: Any) -> None:
    import tritonclient.utils.shared_memory as shared

    source, frames = pictures(9, 1)[0], pictures(10, 4)
    size = source.nbytes
    sequence = Sequence(server, protocol, 51)
    client, module = sequence.client, sequence.module
    name = f"dagan_rt_test_{protocol}"
    region = shared.create_shared_memory_region(name, f"/{name}", 2 * size)
    try:
        client.register_system_shared_memory(name, f"/{name}", 2 * size)
        sequence.start(source)
        for frame, expected in zip(frames, reference(source, frames), strict=True):
            shared.set_shared_memory_region(region, [frame[None]])
            given = module.InferInput("frame", (1, SIZE, SIZE, 3), "UINT8")
            given.set_shared_memory(name, size)
            wanted = module.InferRequestedOutput("image")
            wanted.set_shared_memory(name, size, offset=size)
            client.infer("reenact", [given], outputs=[wanted], sequence_id=51)
            image = shared.get_contents_as_numpy(region, np.uint8, (SIZE, SIZE, 3), offset=size)
            assert (image == expected).all()
        client.unregister_system_shared_memory(name)
        sequence.end()
    finally:
        shared.destroy_shared_memory_region(region)


def test_metrics_count_what_was_done(server: Server) -> None:
    until = threading.Event()
    until.wait(1.5)  # they are refreshed every second
    before = metrics(server)
    sequence = Sequence(server, "grpc", 61)
    source, frames = pictures(1, 1)[0], pictures(2, 5)
    sequence.start(source)
    for frame in frames:
        sequence.drive(frame)
    with pytest.raises(Exception, match="parameter must be one of"):
        sequence.ask(frame=frames[:1], parameters={"speed": 2})
    until.wait(1.5)
    during = metrics(server)
    sequence.end()
    until.wait(1.5)
    after = metrics(server)
    gained = {name: during[name] - before[name] for name in before}
    assert before["dagan_sequences_open"] == after["dagan_sequences_open"] == 0 and during["dagan_sequences_open"] == 1
    assert gained["dagan_frames_driven"] == 5 and gained["dagan_frames_failed"] == 0 and gained["dagan_batches"] == 5
    assert gained["dagan_requests_refused"] == 1
    assert gained["dagan_frame_queue_us"] > 0 and gained["dagan_frame_compute_us"] > 1000
