"""`dagan-rt evaluate` from beginning to end on a tiny model, and everything it refuses with exit code 2."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dagan_rt import checkpoints, cli
from dagan_rt.errors import InputError
from dagan_rt.evaluation import ImageSet, write_pairs
from dagan_rt.evaluation.report import read_evaluations
from dagan_rt.evaluation.subject import Options, chosen_sets


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", ("evaluate",))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_model) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    checkpoints.save(folder / "model.pth.tar", tiny_model("dagan"), folder / "depth")
    return ["--checkpoint", str(folder / "model.pth.tar"), "--depth", str(folder / "depth")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("heads"))


@pytest.fixture
def extractor(tmp_path: Path, write_descriptor) -> str:
    """A pose that is the mean colour, in degrees."""
    path = write_descriptor(tmp_path, "pose", graph={}, scale=1.0, name="mean colour", noise_from="a drawn set")
    path.write_text(path.read_text() + "[noise]\nprmse = 2.5\n")
    return str(path)


def run(*arguments: object) -> int:
    return cli.main(["evaluate", *map(str, arguments), "--quiet"])


def heads(cache: str, extractor: str) -> list[object]:
    return ["--heads", 3, "--frames", 4, "--cache", cache, "--extractors", extractor, "--threads", 1]


def test_from_weights_to_table_and_comparison(
    tmp_path: Path, weights: list[str], cache: str, extractor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*weights, *heads(cache, extractor), "--seed", 4, "--sets", 40]
    assert run(*given, "--out", tmp_path / "first") == 0
    printed = capsys.readouterr().out
    assert "self-reenactment: 36 image sets of 3 clips" in printed and "cross-identity reenactment: 40" in printed
    assert "40 image sets were asked for, and the clips give 36" in printed
    prmse = next(line for line in printed.splitlines() if line.startswith("| PRMSE"))
    assert "| 2.5 | 40 | 0 | mean colour |" in prmse and prmse.count("[") == 2
    assert "| AKD ↓ (pixels at 256) | absent |" in printed and "--lpips-backbone FILE" in printed

    out = tmp_path / "first"
    names = ["evaluation.json", "pairs-cross.csv", "pairs-self.csv", "rows.csv", "sheet.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    found = {it.mode: it for it in read_evaluations(out / "evaluation.json")}
    assert found["self"].settings["motion"] == "absolute" and found["cross"].settings["motion"] == "relative"
    stored = json.loads((out / "evaluation.json").read_text())
    record = stored["provenance"]
    assert set(record["weights sha256"]) == {"model.pth.tar", "encoder.pth", "depth.pth"}
    assert record["extractors"]["pose"]["name"] == "mean colour" and record["options"]["seed"] == 4
    assert str(tmp_path) not in json.dumps(record) and "torchmetrics" in record["versions"]
    with (out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mode"] for row in rows] == ["self"] * 36 + ["cross"] * 40
    assert float(rows[0]["l1"]) == found["self"].rows[0]["l1"] and rows[0]["prmse"] == "" != rows[-1]["prmse"]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 4 * 32 and sheet.height > 6 * 32

    # The same sets from the file of pairs score the same; relative motion does not.
    given = [*weights, *heads(cache, extractor), "--mode", "self", "--pairs", out / "pairs-self.csv", "--seed", 4]
    assert run(*given, "--out", tmp_path / "second") == 0
    again = read_evaluations(tmp_path / "second" / "evaluation.json")[0]
    assert again.scores == found["self"].scores and again.rows == found["self"].rows
    assert run(*given, "--motion", "relative", "--no-baseline", "--out", tmp_path / "third") == 0
    assert json.loads((tmp_path / "third" / "evaluation.json").read_text())["source repeated"] == []
    capsys.readouterr()
    assert run("--compare", *(tmp_path / name / "evaluation.json" for name in ("first", "second", "third"))) == 0
    printed = capsys.readouterr().out
    assert "second minus first" in printed and "| +0 [+0, +0] | 36 | not distinguishable |" in printed
    assert "third minus first" in printed


def test_pairs_of_the_other_mode_are_left_out(tmp_path: Path, fake_clips) -> None:
    clips = fake_clips({"a#0": 9, "a#1": 9, "b#0": 9})
    sets = [ImageSet(0, 1, 0, 2), ImageSet(0, 1, 1, 2), ImageSet(0, 1, 2, 3)]
    write_pairs(tmp_path / "pairs.csv", clips, sets)
    for mode, kept, reason in (("self", 0, "2 rows are left out: they take source and driving frame from two clips"),
                               ("cross", 2, "2 rows are left out: they show one identity twice")):  # fmt: skip
        found = chosen_sets(Options(pairs=tmp_path / "pairs.csv"), clips, mode)
        assert found.sets == [sets[kept]] and reason in found.notes[0]
    write_pairs(tmp_path / "pairs.csv", clips, sets[:1])
    with pytest.raises(InputError, match="all 1 rows show one identity twice; is it for the other --mode"):
        chosen_sets(Options(pairs=tmp_path / "pairs.csv"), clips, "cross")


def test_folders_of_clips_with_bad_ones(
    tmp_path: Path, weights: list[str], extractor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for person in range(3):
        folder = tmp_path / "data" / "test" / f"id{person}#video#0-9"
        folder.mkdir(parents=True)
        for frame in range(3):
            picture = np.random.default_rng([person, frame]).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(picture).save(folder / f"{frame:07d}.png")
    (tmp_path / "data" / "test" / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "data" / "test" / "id0#video#0-9" / "0000001.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    (tmp_path / "data" / "train").mkdir()
    assert run(*weights, "--data", tmp_path / "data", "--threads", 1) == 0
    printed = capsys.readouterr().out
    assert "cross mode is left out: it needs extractors" in printed and "cross-identity" not in printed
    assert "1 of 4 clips are left out" in printed and "broken.mp4" in printed
    assert "4 image sets are left out: 1 clips cannot be read" in printed and "14 image sets of" in printed
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "a model is missing"),
        (["--checkpoint", "MODEL"], "frames are missing"),
        (["--checkpoint", "gone.tar", "--heads", "3"], "gone.tar does not exist"),
        (["--bundle", "gone", "--heads", "3"], "gone"),
        (["--checkpoint", "MODEL", "--heads", "1"], "--heads must be at least 2"),
        (["--checkpoint", "MODEL", "--heads", "3", "--sets", "0"], "--sets must be at least 1"),
        (["--checkpoint", "MODEL", "--data", "gone"], "data folder gone does not exist"),
        (["--checkpoint", "MODEL", "--heads", "3", "--pairs", "x.csv"], "--pairs needs --mode self or --mode cross"),
        (["--checkpoint", "MODEL", "--heads", "3", "--backend", "torch"], "--backend goes with --bundle"),
        (["--bundle", "gone", "--heads", "3", "--depth", "d"], "--depth goes with --checkpoint"),
        (["--checkpoint", "MODEL", "--heads", "3", "--mode", "self", "--adapt-scale"], "add --motion relative"),
        (["--checkpoint", "MODEL", "--heads", "3", "--extractors", "gone.toml"], "gone.toml cannot be read"),
        (["--checkpoint", "MODEL", "--heads", "3", "--extractors", "POSE", "POSE"], "both give pose"),
        (["--checkpoint", "MODEL", "--heads", "3", "--extractors", "POSE", "--lpips-backbone", "gone.pth"], "gone.pth"),
        (["--checkpoint", "MODEL", "--heads", "3", "--extractors", "POSE", "--device", "abacus"], "cpu or cuda"),
        (["--checkpoint", "MODEL", "--heads", "3", "--out", "gone/inside"], "the folder gone does not exist"),
        (["--checkpoint", "MODEL", "--heads", "3", "--out", "FULL"], "holds something other than an evaluation"),
        (["--compare", "gone.json", "gone.json"], "gone.json does not exist"),
        (["--compare", "JSON"], "at least two"),
        (["--compare", "TEXT", "TEXT"], "is not an evaluation"),
        (["--compare", "OTHER", "OTHER"], "has format 9"),
    ],
)
def test_refusals(
    tmp_path: Path, weights: list[str], extractor: str, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "text.json").write_text("[1, 2")
    (tmp_path / "other.json").write_text('{"format": 9}')
    (tmp_path / "some.json").write_text('{"format": 1, "evaluations": []}')
    known = {"MODEL": weights[1:], "POSE": [extractor], "FULL": ["full"], "TEXT": ["text.json"],
             "OTHER": ["other.json"], "JSON": ["some.json"]}  # fmt: skip
    assert run(*(value for it in arguments for value in known.get(it, [it]))) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(file.name for file in (tmp_path / "full").iterdir()) == ["thesis.txt"]


def test_a_disk_that_fills_up_leaves_what_was_there(
    tmp_path: Path, weights: list[str], cache: str, extractor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        *weights,
        *heads(cache, extractor),
        "--mode",
        "self",
        "--sets",
        3,
        "--no-baseline",
        "--out",
        tmp_path / "out",
    ]
    assert run(*given) == 0
    (tmp_path / "out" / "pairs-cross.csv").write_text("of an earlier evaluation\n")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "sheet.png")

    with monkeypatch.context() as patched:
        patched.setattr("dagan_rt.training.sheets.write_sheet", full)
        assert run(*given, "--seed", 9) == 2
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert sorted(file.name for file in tmp_path.glob(".*")) == []
    assert run(*given, "--seed", 9) == 0
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert after.keys() == before.keys() - {"pairs-cross.csv"} and after["rows.csv"] != before["rows.csv"]


@pytest.mark.slow
def test_a_bundle_scores_as_its_checkpoint(tmp_path: Path, weights: list[str], cache: str, extractor: str) -> None:
    from dagan_rt.export.__main__ import main as export

    assert export([*weights, "--out", str(tmp_path / "bundle")]) == 0
    common = [*heads(cache, extractor), "--motion", "relative", "--adapt-scale"]
    assert run(*weights, *common, "--out", tmp_path / "torch") == 0
    assert run("--bundle", tmp_path / "bundle", "--backend", "onnxruntime", *common, "--out", tmp_path / "onnx") == 0
    ones, others = (read_evaluations(tmp_path / name / "evaluation.json") for name in ("torch", "onnx"))
    for one, other in zip(ones, others, strict=True):
        assert one.scores.keys() == other.scores.keys() and len(one.rows) == len(other.rows)
        for metric in one.scores:
            tolerance = {"psnr": 0.05, "prmse": 0.2}.get(metric, 2e-3)
            assert one.scores[metric].mean == pytest.approx(other.scores[metric].mean, abs=tolerance), metric
            worst = max(abs(a[metric] - b[metric]) for a, b in zip(one.rows, other.rows, strict=True))
            assert worst < 10 * tolerance, metric
