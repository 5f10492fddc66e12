"""Sessions on ensembles, with the real tritonserver: the engines are imitated, all that is between them is Triton's."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt import Reenactor
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.export.triton_graphs import write_graphs
from dagan_rt.images import encode_image
from dagan_rt.serving.client import Client, Session
from dagan_rt.serving.graph_client import Layout
from dagan_rt.serving.protocol import DRIVE_MODEL
from dagan_rt.serving.repository import ServingPlan
from dagan_rt.serving.server import Server
from dagan_rt.serving.transport import Place

BACKEND = Path(__file__).with_name("onnxruntime_backend")
PLAN = ServingPlan(layout="graphs", threads=1, queue=2, sequences=4, deadline=0.02)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def served(bundle: Bundle, server_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests: it keeps nothing of one for another."""
    models = tmp_path_factory.mktemp("graphs") / "models"
    write_graphs(bundle, models, PLAN)
    server = Server(models, server_python, backends={"onnxruntime": BACKEND}).start()
    yield server
    server.kill()


@pytest.fixture
def connect(served: Server) -> Iterator[Callable[..., Client]]:
    """`connect(**arguments of Client) -> Client`, closed with the test."""
    clients: list[Client] = []

    def open_client(scheme: str = "grpc", **arguments: Any) -> Client:
        url = served.grpc_url if scheme == "grpc" else served.http_url
        clients.append(Client(url, timeout=PATIENCE, **arguments))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3)).astype(np.uint8)


def in_process(bundle: Bundle, source: np.ndarray, frames: Any, **options: Any) -> np.ndarray:
    with Reenactor(bundle, "onnxruntime", threads=1, **options) as reenactor:
        reenactor.set_source(source)
        return np.stack([reenactor.drive(frame) for frame in frames])


def requests(session: Session) -> list[Any]:
    """Every request that the session's client will make."""
    made, transport = [], session._client._client.transport
    infer = transport.infer

    async def watched(call: Any) -> Any:
        made.append(call)
        return await infer(call)

    transport.infer = watched  # type: ignore[method-assign]
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "shared", "forms"), [("grpc", True, 4), ("http", True, 1), ("http", False, 1)])
def test_images_are_those_of_the_library(bundle: Bundle, connect: Any, scheme: str, shared: bool, forms: int) -> None:
    client = connect(scheme, shared_memory=shared)
    assert client.served.model == DRIVE_MODEL and client.served.parameters["variant"] == "dagan" and client.size == 64
    source, other, *frames = pictures(5)
    every: list[dict[str, Any]] = [
        {"adapt_scale": True, "motion_scale": 0.7}, {"motion": "absolute"}, {"motion_scale": 2}, {}
    ]  # fmt: skip
    for options in every[:forms]:
        with client.open(source, **options) as session:
            want = in_process(bundle, source, frames, **options)
            np.testing.assert_array_equal([session.drive(frame) for frame in frames], want)
            session.reset()
            later = frames[1:]
            want = in_process(bundle, source, later, **options)
            np.testing.assert_array_equal([session.drive(frame) for frame in later], want)
            session.set_source(encode_image(other, "PNG"))
            want = in_process(bundle, other, frames, **options)
            np.testing.assert_array_equal([session.drive(frame) for frame in frames], want)
            with Reenactor(bundle, "onnxruntime", threads=1) as reenactor:
                np.testing.assert_array_equal(session.keypoints(source).value, reenactor.keypoints(source).value)


@pytest.mark.slow
def test_with_shared_memory_a_frame_travels_by_name_alone(connect: Any) -> None:
    source, first, second = pictures(3)
    for shared in (True, False):
        with connect(shared_memory=shared).open(source) as session:
            session.drive(first)
            made = requests(session)
            session.drive(second)
            (call,) = made
            travels = {name for name, value in call.inputs.items() if not isinstance(value, Place)}
            assert call.model == DRIVE_MODEL
            assert travels == ({"scale"} if shared else set(call.inputs))


@pytest.mark.slow
def test_the_server_is_a_backend(bundle: Bundle, served: Server) -> None:
    source, *frames = pictures(4)
    with Reenactor(served.grpc_url) as remote:
        remote.set_source(source)
        np.testing.assert_array_equal([remote.drive(frame) for frame in frames], in_process(bundle, source, frames))


@pytest.mark.slow
def test_sessions_share_batches_and_never_mix(bundle: Bundle, served: Server, connect: Any) -> None:
    client = connect()
    sources, frames = pictures(4, 1), pictures(12, 2)
    before = statistics(served)
    with ThreadPoolExecutor(4) as threads:

        def drive(number: int) -> list[np.ndarray]:
            with client.open(sources[number], ahead=2) as session:
                return list(session.stream(frames))

        found = np.stack(list(threads.map(drive, range(4)))).astype(int)
    want = np.stack([in_process(bundle, source, frames) for source in sources]).astype(int)
    for image, which in zip(found.reshape(-1, 64, 64, 3), np.ndindex(4, 12), strict=True):
        apart = np.abs(image - want).mean(axis=(2, 3, 4))
        assert apart[which] < 0.002  # a batch adds in another order: a level may turn over
        apart[which] = np.inf
        assert apart.min() > 0.004
    frames_run, executions, largest = (after - past for after, past in zip(statistics(served), before, strict=True))
    assert frames_run == 48 and executions < 48 and largest > 0


def statistics(server: Server) -> tuple[int, int, int]:
    """Of the generator: frames, executions, and those of more than one frame."""
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(server.http_url.removeprefix("http://"))
    (model,) = client.get_inference_statistics("dagan_generator")["model_stats"]
    client.close()
    several = sum(int(row["compute_infer"]["count"]) for row in model["batch_stats"] if int(row["batch_size"]) > 1)
    return int(model["inference_count"]), int(model["execution_count"]), several


@pytest.mark.slow
def test_more_than_the_queue_holds_is_refused(bundle: Bundle, served: Server) -> None:
    """By Triton itself, at once; what it took is answered."""
    import tritonclient.grpc as grpc

    with grpc.InferenceServerClient(served.grpc_url.removeprefix("grpc://")) as client:

        def tensor(name: str, array: np.ndarray) -> Any:
            made = grpc.InferInput(name, list(array.shape), "UINT8" if array.dtype == np.uint8 else "FP32")
            made.set_data_from_numpy(array)
            return made

        source, frame = pictures(2)
        opened = client.infer("dagan_open", [tensor("image", source[None])])
        state = {output.name: opened.as_numpy(output.name) for output in opened.get_response().outputs}
        points = client.infer("dagan_keypoints", [tensor("frame", frame[None])])
        state |= {f"initial_{name}": points.as_numpy(name) for name in ("kp_value", "kp_jacobian")}
        inputs = [tensor(name, array) for name, array in state.items()]
        inputs += [tensor("scale", np.ones((1, 1), np.float32)), tensor("frame", frame[None])]
        answers: queue.Queue[Any] = queue.Queue()
        wanted = [grpc.InferRequestedOutput("image")]
        for _ in range(120):
            client.async_infer(
                "dagan_drive", inputs, lambda result, error: answers.put((result, error)), outputs=wanted
            )
        outcomes = [answers.get(timeout=PATIENCE) for _ in range(120)]
        errors = [str(error) for _, error in outcomes if error is not None]
        assert errors and all("UNAVAILABLE" in it and "Exceeds maximum queue size" in it for it in errors)
        want = in_process(bundle, source, [frame])[0].astype(int)
        images = [result.as_numpy("image")[0] for result, error in outcomes if error is None]
        assert images and max(np.abs(image - want).mean() for image in images) < 0.002
        with pytest.raises(Exception, match="UNAVAILABLE.*timeout expired"):
            client.infer("dagan_drive", inputs, outputs=wanted, timeout=1)  # microsecond


@pytest.mark.slow
def test_sessions_outlive_their_server(bundle: Bundle, served: Server, connect: Any) -> None:
    source, *frames = pictures(4)
    want = in_process(bundle, source, frames)
    with connect(shared_memory=True).open(source) as mapped, connect(shared_memory=False).open(source) as sent:
        for session in (mapped, sent):
            np.testing.assert_array_equal(session.drive(frames[0]), want[0])
        served.kill()
        served.start()
        for session in (mapped, sent):
            np.testing.assert_array_equal([session.drive(frame) for frame in frames[1:]], want[1:])


class Configs:
    """A transport that knows configs alone."""

    address = "grpc://nowhere:1"

    def __init__(self, **changes: Any) -> None:
        points = [self.tensor("kp_value", 10, 2), self.tensor("kp_jacobian", 10, 2, 2)]
        kept = [self.tensor("feature", 16, 16, 16), *({**it, "name": f"source_{it['name']}"} for it in points)]
        initial = [{**it, "name": f"initial_{it['name']}"} for it in points]
        taken = [*kept, *initial, self.tensor("scale", 1), self.tensor("frame", 64, 64, 3)]
        self.configs = {
            "dagan_open": {"name": "dagan_open", "max_batch_size": 8, "output": kept},
            "dagan_keypoints": {"name": "dagan_keypoints", "max_batch_size": 8, "output": points},
            "dagan_drive": {"name": "dagan_drive", "max_batch_size": 8, "input": taken},
        }  # fmt: skip
        for name, tensors in changes.items():
            self.configs[f"dagan_{name}"]["input" if name == "drive" else "output"] = tensors

    @staticmethod
    def tensor(name: str, *dims: int) -> dict[str, Any]:
        kind = "TYPE_UINT8" if name == "frame" else "TYPE_FP32"
        return {"name": name, "data_type": kind, "dims": [str(size) for size in dims]}  # as gRPC's JSON has them

    async def config(self, name: str) -> dict[str, Any]:
        return self.configs[name]


def test_the_tensors_of_a_session_are_read_from_the_server() -> None:
    layout = asyncio.run(Layout.read(Configs()))  # type: ignore[arg-type]
    assert {name: it.shape for name, it in layout.tensors.items()} == {
        "feature": (1, 16, 16, 16), "source_kp_value": (1, 10, 2), "source_kp_jacobian": (1, 10, 2, 2),
        "initial_kp_value": (1, 10, 2), "initial_kp_jacobian": (1, 10, 2, 2),
    }  # fmt: skip
    assert layout.kept["feature"].nbytes == 4 * 16**3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open": [Configs.tensor("feature", 16, 16, 8)]}, "do not belong together"),
        ({"drive": [Configs.tensor("frame", 64, 64, 3)]}, "do not belong together"),
        ({"open": [Configs.tensor("feature", 1 << 20, 1 << 20)]}, "none of dagan-rt"),
        ({"open": [Configs.tensor("feature", -1, 16)]}, "none of dagan-rt"),
    ],
)
def test_a_server_of_something_else_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        asyncio.run(Layout.read(Configs(**changes)))  # type: ignore[arg-type]
