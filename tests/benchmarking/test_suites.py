"""Suites: what a file may say, what a selection leaves, and which rows follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagan_rt._assets import asset
from dagan_rt.benchmarking.rows import OURS
from dagan_rt.benchmarking.suites import PEERS, Case, FrameSuite, Suite
from dagan_rt.errors import InputError

KERNELS = asset("benchmarks", "suites", "kernels.toml")


def written(folder: Path, text: str) -> Suite:
    path = folder / "suite.toml"
    path.write_text(text)
    return Suite.read(path)


def test_the_suite_of_kernels_measures_every_operation_and_goal() -> None:
    from dagan_rt.benchmarking.operations import OPERATIONS

    suite = Suite.read(KERNELS)
    cases = suite.cases()
    assert {case.op for case in cases} == set(OPERATIONS)
    for op in OPERATIONS:
        assert {case.batch for case in cases if case.op == op} >= {1, 8, 32}
        assert {case.dtype for case in cases if case.op == op} == {"float16", "bfloat16", "float32"}
        assert {case.layout for case in cases if case.op == op} == {"nchw", "nhwc"}
    assert len(suite.goals) >= 4
    for goal in suite.goals:
        for op in goal.ops:
            forms = cases[Case(op, goal.batch, goal.dtype, goal.layout, goal.flow)]
            assert not goal.over or any(form.startswith(goal.over) for form in forms)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ('op = "warp"', ("runs[0].op", "flow_warp", "'warp'")),
        ('op = "dense_flow"\ndtypes = ["float64"]', ("runs[0].dtypes", "'float16'", "'float64'")),
        ('op = "dense_flow"\nlayouts = ["NCHW"]', ("runs[0].layouts", "'NCHW'")),
        ('op = "dense_flow"\nflows = ["smooth"]', ("runs[0].flows", "'smooth'")),
        ('op = "flow_warp"', ("runs[0].flows", "'smooth', 'scatter'", "''")),
        ('op = "dense_flow"\nbatches = [1, 0]', ("runs[0].batches", "at least 1")),
        ('op = "dense_flow"\nbatches = []', ("runs[0].batches", "at least 1")),
        ('op = "dense_flow"\npeers = ["naive"]', ("runs[0].peers", "'naive'", "dense_flow")),
        ('op = "cross_attention"\npeers = ["sdpa flash 4by64"]', ("'sdpa flash 4by64'",)),
        ('op = "cross_attention"\npeers = ["compile eager"]', ("'compile eager'",)),
        ('op = "dense_flow"\nrepeat = 3', ("runs[0].repeat", "not a known key")),
    ],
)
def test_what_a_suite_must_not_say(tmp_path: Path, run: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        written(tmp_path, f"[[runs]]\n{run}\n")
    message = str(caught.value)
    assert "suite.toml" in message and all(word in message for word in words), message


def test_runs_of_one_case_add_their_peers(tmp_path: Path) -> None:
    suite = written(
        tmp_path,
        """
        [[runs]]
        op = "cross_attention"
        batches = [1, 8]
        peers = ["naive", "sdpa math"]
        [[runs]]
        op = "cross_attention"
        batches = [8]
        peers = ["sdpa flash 4x64", "naive"]
        """,
    )
    assert suite.cases() == {
        Case("cross_attention", 1, "float16", "nhwc"): (OURS, "naive", "sdpa math"),
        Case("cross_attention", 8, "float16", "nhwc"): (OURS, "naive", "sdpa math", "sdpa flash 4x64"),
    }


def test_a_selection() -> None:
    suite = Suite.read(KERNELS)
    chosen = suite.select(ops=("flow_warp",), batches=("1",), dtypes=("float16",), peers=("eager",))
    assert set(chosen.cases()) == {
        Case("flow_warp", 1, "float16", layout, flow) for layout in ("nhwc", "nchw") for flow in ("smooth", "scatter")
    }
    smooth = chosen.cases()[Case("flow_warp", 1, "float16", "nhwc", "smooth")]
    assert smooth == (OURS, "eager", "eager, T flow")
    assert all(forms == (OURS,) for forms in suite.select(peers=()).cases().values())
    with pytest.raises(InputError, match="no row of ops flow_warp; batches 7"):
        suite.select(ops=("flow_warp",), batches=("7",))


def test_the_digest_is_of_the_text(tmp_path: Path) -> None:
    text = '[[runs]]\nop = "dense_flow"\n'
    first, again, other = (written(tmp_path, each).digest for each in (text, text, text + "# other\n"))
    assert first == again != other and len(first) == 64


def test_the_suite_of_frames_measures_every_form_and_goal() -> None:
    suite = FrameSuite.read(asset("benchmarks", "suites", "frames.toml"))
    batches = {form.name: form.batches for form in suite.forms}
    assert set(batches) == {OURS, *PEERS} and batches[OURS] == (1, 2, 4, 8, 16, 32, 64)
    assert suite.load.streams[0] == 1 and suite.load.streams[-1] == 128 and suite.load.fps == 30
    for goal in suite.goals:
        assert goal.group in ("latency", "throughput", "streams") and (not goal.over or goal.over in PEERS)
        if batch := goal.case.get("batch"):
            assert all(int(batch) in batches[name] for name in (OURS, *filter(None, (goal.over,))))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[forms]]\nname = "tensorrt"\nbatches = [1]', ("forms[0].name", "dagan-rt", "'tensorrt'")),
        ('[[forms]]\nname = "dagan-rt"\nbatches = [0]', ("forms[0].batches", "at least 1")),
        ('[[forms]]\nname = "dagan-rt"\nbatches = []', ("forms[0].batches", "at least 1")),
        ("forms = []\n[load]\nstreams = [0]", ("load.streams", "at least 1")),
        ("forms = []\nstage = [1]", ("stage", "not a known key")),
        ("stages = [1]", ("lacks", "forms")),
    ],
)
def test_what_a_suite_of_frames_must_not_say(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "suite.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        FrameSuite.read(tmp_path / "suite.toml")
    assert "suite.toml" in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
