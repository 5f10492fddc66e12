"""How a GPU is timed, on an imitation of PyTorch's CUDA interface with a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dagan_rt.benchmarking.devices import MOST_SETS, Gpu, open_device  # noqa: E402
from dagan_rt.benchmarking.rows import ALONE, CALL, HOST  # noqa: E402
from dagan_rt.benchmarking.suites import Effort  # noqa: E402
from dagan_rt.errors import InputError  # noqa: E402

EFFORT = Effort(row_seconds=0.01, repeats=8)
LAUNCH = 40.0  # microseconds that an eager call takes longer than the same in a graph


class Cuda:
    """torch.cuda, as far as `Gpu` uses it. Calls advance the clock, or a graph that captures them."""

    def __init__(self) -> None:
        self.now, self.graphs, self.capturing = 0.0, [], None
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) / 1e3  # milliseconds

        class CUDAGraph:
            def __init__(self) -> None:
                self.cost, self.calls = 0.0, 0
                cuda.graphs.append(self)

            def capture_begin(self, capture_error_mode: str) -> None:
                cuda.capturing = self

            def capture_end(self) -> None:
                cuda.capturing = None

            def replay(self) -> None:
                cuda.now += self.cost

        self.Event, self.CUDAGraph = Event, CUDAGraph
        self.Stream = lambda: SimpleNamespace(synchronize=lambda: None)
        self.is_available, self.current_device = lambda: True, lambda: 0
        self.synchronize = self.empty_cache = lambda: None
        self.get_device_properties = lambda device: SimpleNamespace(
            name="imitation", L2_cache_size=50_000_000, total_memory=80_000_000_000
        )

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def call(self, microseconds: float, name: str = "") -> Callable[[], tuple[Any, ...]]:
        def run() -> tuple[Any, ...]:
            if self.capturing:
                self.capturing.cost += microseconds
                self.capturing.calls += 1
            else:
                self.now += microseconds + LAUNCH
            return (name, self.capturing)

        return run


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    imitation = Cuda()
    monkeypatch.setattr(torch, "cuda", imitation)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: SimpleNamespace(zero_=lambda: None))
    return imitation


def test_the_time_is_the_graphs_and_of_one_call(cuda: Cuda) -> None:
    measured = Gpu().measure([cuda.call(7.0, str(at)) for at in range(20)], EFFORT)
    timing = measured.times[CALL]
    assert timing.p50 == pytest.approx(7.0) and (timing.calls, timing.repeats) == (20, 8)
    assert "CUDA graph of 20 calls, 20 sets" in measured.method
    assert measured.times[HOST].repeats == 20
    assert measured.outputs[0] == "19" and measured.outputs[1] is cuda.graphs[0]
    assert measured.times[ALONE].p50 == pytest.approx(7.0) and cuda.graphs[1].calls == 1


def test_a_graph_lasts_long_enough_and_takes_whole_turns(cuda: Cuda) -> None:
    measured = Gpu().measure([cuda.call(10.0) for _ in range(3)], EFFORT)
    assert measured.times[CALL].calls == 6  # three sets, two turns: 8 eager calls of 50 µs would be 400 µs
    measured = Gpu().measure([cuda.call(900.0)], EFFORT)
    assert measured.times[CALL].calls == 1 and ALONE not in measured.times
    assert measured.times[CALL].p50 == pytest.approx(900.0) and measured.times[CALL].repeats == 8
    assert Gpu().measure([cuda.call(5000.0)], EFFORT).times[CALL].repeats == 5  # 10 ms of repeats, but five at least


def test_what_cannot_be_captured_is_timed_in_the_stream_and_says_so(cuda: Cuda) -> None:
    eager = cuda.call(7.0)

    def synchronizing() -> tuple[Any, ...]:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return eager()

    measured = Gpu().measure([synchronizing], EFFORT)
    assert measured.times[CALL].p50 == pytest.approx(7.0 + LAUNCH) and ALONE not in measured.times
    assert "not captured: operation not permitted" in measured.method and cuda.capturing is None


def test_as_many_sets_as_make_twice_the_cache(cuda: Cuda) -> None:
    device = Gpu()
    assert [device.sets(size) for size in (1e9, 5e7, 3e7, 1.0)] == [1, 2, 4, MOST_SETS]


def test_no_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs an NVIDIA GPU .*--device cpu"):
        open_device("cuda")


@pytest.mark.gpu
def test_a_copy_on_a_gpu() -> None:
    device = Gpu()
    with device.active():
        source = torch.rand(1 << 26, device=device.place)
        target = torch.empty_like(source)
        measured = device.measure([lambda: (target.copy_(source),)], EFFORT)
    assert measured.method.startswith("CUDA graph") and measured.times[CALL].p10 > 0
    assert torch.equal(source, target)


@pytest.mark.gpu
def test_a_backward_pass_is_captured_alone() -> None:
    from dagan_rt.benchmarking import peers
    from dagan_rt.benchmarking.kernels import measure_case
    from dagan_rt.benchmarking.operations import OPERATIONS
    from dagan_rt.benchmarking.suites import Case, Run, Suite

    device, suite = Gpu(), Suite((Run("flow_warp_backward"),), effort=EFFORT)
    case = Case("flow_warp_backward", 2, "float32", "nchw", "smooth")
    assert peers.known(OPERATIONS[case.op].forward, "eager")
    with device.active():
        (row,) = measure_case(case, ["eager"], suite, device, float("inf"))
    assert row.status == "measured" and row.method.startswith("CUDA graph"), row
