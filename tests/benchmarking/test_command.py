"""`python -m dagan_rt.benchmarking` as a shell sees it, also where only NumPy, PyTorch and tqdm are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.benchmarking.__main__ import main
from dagan_rt.benchmarking.rows import Results, Row, Timing

SUITE = """
[shapes]
image = 16
feature = 8
points = 3
channels = 16
queries = 4
[effort]
row_seconds = 0.001
repeats = 5
[[runs]]
op = "flow_warp"
flows = ["smooth"]
dtypes = ["float16", "float32"]
peers = ["eager"]
[[runs]]
op = "dense_flow"
peers = ["eager"]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    return path


def test_a_run_on_the_cpu_is_printed_kept_and_compared(suite: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    given = ["kernels", "--suite", str(suite), "--device", "cpu", "--ops", "flow_warp", "--dtypes", "float32"]
    assert main([*given, "--out", str(out), "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    results = Results.read(out)
    assert [(row.group, row.form, row.status) for row in results.rows] == [
        ("flow_warp", "dagan-rt", "measured"),
        ("flow_warp", "eager", "measured"),
    ]
    assert results.provenance["commit"] == "abc" and len(results.provenance["suite digest"]) == 64
    assert "flow_warp: B·h·w·(2·C·s + 12) bytes" in printed and "batch 1, fp32, nhwc, smooth" in printed
    assert main(["show", str(out), "--compare", str(out)]) == 0
    assert "2 rows as before, 0 regressions" in capsys.readouterr().out


def test_a_regression_and_a_wrong_result_are_exit_code_1(tmp_path: Path) -> None:
    def kept(name: str, p50: float, status: str = "measured") -> str:
        times = {"call": Timing(p50, p50, p50, 5)} if status == "measured" else {}
        row = Row("flow_warp", {"batch": "1"}, "dagan-rt", status, times=times)
        Results("kernels", {}, {}, (row,)).write(tmp_path / name)
        return str(tmp_path / name)

    old, new = kept("old.json", 10.0), kept("new.json", 20.0)
    assert main(["show", new]) == 0
    assert main(["show", new, "--compare", old]) == 1
    assert main(["show", old, "--compare", new]) == 0
    assert main(["show", kept("wrong.json", 0.0, "wrong")]) == 1


def test_what_cannot_be_run_is_one_sentence(suite: Path, tmp_path: Path, capsys: Any) -> None:
    for given, words in (
        (["kernels", "--suite", str(suite), "--batches", "3", "--device", "cpu"], ("no row of batches 3",)),
        (["kernels", "--suite", str(tmp_path / "none.toml")], ("none.toml", "cannot be read")),
        (["kernels", "--suite", str(suite), "--device", "cpu", "--out", "out.txt"], ("out.txt", ".json")),
        (["kernels", "--suite", str(suite), "--device", "cpu", "--compare", str(suite)], ("suite.toml", "JSON")),
    ):
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m dagan_rt.benchmarking: error: ") and error.count("\n") == 1
        assert all(word in error for word in words), error


def test_a_bare_machine_is_enough(suite: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    frames = tmp_path / "frames.toml"
    frames.write_text(FRAMES)
    # A name that is None in sys.modules cannot be imported.
    program = (
        "import sys\n"
        "for name in ('av', 'PIL', 'onnx', 'onnxruntime', 'onnxscript', 'onnxsim', 'matplotlib', 'tensorrt'):\n"
        "    sys.modules[name] = None\n"
        "import dagan_rt.benchmarking.__main__ as command, dagan_rt.kernels\n"
        "assert not {'torch', 'cupy'} & set(sys.modules), 'importing loads something heavy'\n"
        f"code = command.main(['kernels', '--suite', {str(suite)!r}, '--device', 'cpu', '--quick'])\n"
        "frames = ['--device', 'cpu', '--model', 'small', '--forms', 'torch', '--batches', '1', '--seconds', '30']\n"
        f"sys.exit(code or command.main(['frames', '--suite', {str(frames)!r}, *frames]))"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "dagan-rt torch" in done.stdout and "full" not in done.stdout
    assert "fp16" in done.stdout and "fp32, nhwc" not in done.stdout  # --quick


FRAMES = """
stages = [1]
[effort]
seconds = 60
row_seconds = 0.01
repeats = 3
[[forms]]
name = "dagan-rt"
batches = [1, 2]
[[forms]]
name = "eager-fp16"
batches = [1]
[load]
streams = [1]
fps = 10
seconds = 0.5
"""


def test_frames_of_a_bundle_are_measured_shown_compared_and_reported(
    tiny_bundle: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("matplotlib")
    from dagan_rt.cli import main as dagan_rt

    suite, out = tmp_path / "frames.toml", tmp_path / "frames.json"
    suite.write_text(FRAMES)
    given = ["--bundle", str(tiny_bundle), "--device", "cpu", "--suite", str(suite), "--forms", "onnxruntime", "eager"]
    assert dagan_rt(["bench", "frames", *given, "--batches", "1", "--out", str(out)]) == 0
    results = Results.read(out)
    assert [(row.form, row.status) for row in results.rows if row.group == "latency"] == [
        ("dagan-rt onnxruntime", "measured"), ("eager-fp16", "measured"),
    ]  # fmt: skip
    row, *_ = results.rows
    shown = "dagan-rt bench frames --bundle bundle --device cpu --suite frames.toml --forms onnxruntime --batches 1"
    assert row.command == shown
    assert str(tmp_path) not in out.read_text()
    assert "goal" not in capsys.readouterr().out  # the suite has none
    assert dagan_rt(["bench", "show", str(out), "--compare", str(out)]) == 0
    assert "4 rows as before, 0 regressions" in capsys.readouterr().out
    assert dagan_rt(["bench", "report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "onnxruntime" in (tmp_path / "report" / "index.html").read_text()


def test_what_frames_refuse(tmp_path: Path, capsys: Any) -> None:
    for given, words in (
        (["frames", "--device", "cpu", "--forms", "tensorflow"], ("--forms", "published", "'tensorflow'")),
        (["frames", "--device", "cpu", "--batches", "0"], ("--batches", "at least 1")),
        (["frames", "--device", "cpu", "--bundle", str(tmp_path / "none")], ("none", "bundle")),
        (["frames", "--device", "cpu", "--seconds", "0"], ("--seconds", "positive")),
        (["streams", "--device", "cpu", "--streams", "-1"], ("--streams", "at least 1")),
        (["streams", "--device", "cpu", "--fps", "nan"], ("--fps", "positive")),
        (["streams", "--device", "cpu", "--soak", "-5"], ("--soak", "-5")),
        (["subnetworks", "--device", "cpu", "--batches", "0"], ("--batches", "at least 1")),
        (["report", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")], ("none.json", "cannot be read")),
    ):
        assert main(given) == 2, given
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()
