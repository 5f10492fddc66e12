"""The loader's benchmark: it times what it has checked, and says when a frame is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagan_rt.training.data import bench
from dagan_rt.training.data.__main__ import main


@pytest.fixture
def data(tmp_path: Path, write_frames: Any) -> Path:
    write_frames(tmp_path / "a", [10, 80, 150, 220])
    return tmp_path


def options(data: Path, *more: str) -> list[str]:
    return ["bench", str(data), "--size", "16", "--batch", "2", "--threads", "1", "--seconds", "0.01", *more]


def test_every_form_is_checked_and_timed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(data, "--step-ms", "20")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 clips, 4 frames at 16 pixels, batches of 2")
    assert [line[:12].strip() for line in lines[2:]] == list(bench.FORMS)
    for line in lines[2:]:
        assert line.split()[-5:-3] != [] and float(line[21:30]) > 0 and "waits" in line


def test_a_wrong_frame_is_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, decode = bench.FORMS["png packed"]
    monkeypatch.setattr(bench, "FORMS", {"png packed": (write, lambda path: decode(path)[::-1])})
    assert main(options(data)) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.setattr(bench, "FORMS", {"png packed": (write, lambda path: decode(path)[:-1])})
    assert main(options(data)) == 1


def test_clips_that_cannot_be_read_are_passed_over(
    data: Path, write_frames: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_frames(data / "0", [10, 20])
    (data / "0" / "0001.png").write_bytes(b"gone")
    assert main(options(data, "--neighbours", "1")) == 0
    said = capsys.readouterr()
    assert said.out.startswith("1 clips, 4 frames") and "clip skipped: 0: 0001.png is not an image" in said.err
    (data / "a" / "0000.png").write_bytes(b"gone")
    assert main(options(data)) == 2
    assert "no clip in" in capsys.readouterr().err


class Slow:
    """A loader that takes as long as it is told."""

    threads = 1

    def __init__(self, clock: list[float], makes: float) -> None:
        self.clock, self.makes = clock, makes

    def from_step(self, step: int) -> Any:
        while True:
            self.clock[0] += self.makes
            yield {"source": np.zeros(1)}


def test_waiting_is_what_a_step_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench.time, "sleep", sleep)
    count, took, waited = bench._consume(Slow(clock, 0.03), 1.0, 0.07)  # type: ignore[arg-type]
    assert took == pytest.approx(0.1 * count) and waited == pytest.approx(0.03 * count) and count >= 10


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--size", "8"], ["--seconds", "0"], ["--frames", "2"]])
def test_bad_options_say_so(data: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(data, *wrong)) == 2
    assert wrong[0] in capsys.readouterr().err
    assert main(["bench", str(data / "nowhere")]) == 2
