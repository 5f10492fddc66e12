"""The loop: exact continuation, signals, divergence, what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dagan_rt import checkpoints
from dagan_rt.errors import InputError
from dagan_rt.networks.model import Model
from dagan_rt.training import journal, loop
from dagan_rt.training import steps as training_steps
from dagan_rt.training.held_out import evaluate, fixed_pairs
from dagan_rt.training.recipe import Recipe, parse_recipe
from dagan_rt.training.saving import latest_checkpoint


def test_an_interrupted_run_ends_like_an_uninterrupted_one_bit_for_bit(
    recipe: Recipe, whole: tuple[Path, loop.Outcome], tmp_path: Path, weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    for steps in (3, 4, 5, 6):  # inside a stage, at its end, in the next
        outcome = loop.train(recipe, tmp_path, steps=steps, progress=False)
        assert outcome.step == steps
    expected, got = weights(whole[0]), weights(tmp_path)
    assert expected.keys() == got.keys() and len(got) > 400
    different = [name for name in got if not torch.equal(expected[name], got[name])]
    assert not different
    terms = [[row["terms"] for row in journal.read_rows(run)] for run in (whole[0], tmp_path)]
    assert terms[0] == terms[1] and len(terms[0]) == 6


def test_killed_without_warning_it_continues_from_the_last_checkpoint(
    recipe: Recipe, whole: tuple[Path, loop.Outcome], tmp_path: Path, weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    trainer = loop.Trainer(recipe, tmp_path, progress=False)
    trainer.open_folder(resume=True)
    trainer._checkpoint = lambda: None if trainer.step > 3 else type(trainer)._checkpoint(trainer)  # type: ignore[method-assign]
    trainer.run(5, [])  # steps 4 and 5 are lost
    loop.train(recipe, tmp_path, progress=False)
    expected, got = weights(whole[0]), weights(tmp_path)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert [row["step"] for row in journal.read_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_what_a_run_leaves_behind(recipe: Recipe, whole: tuple[Path, loop.Outcome]) -> None:
    run, outcome = whole
    assert (outcome.step, outcome.total, outcome.signal) == (6, 6, 0)
    rows = journal.read_rows(run)
    assert [row["stage"] for row in rows] == ["coarse"] * 4 + ["fine"] * 2
    assert rows[-1]["samples"] == 12 and rows[-1]["samples_per_second"] > 0
    assert "discriminator" in rows[-1]["terms"] and "discriminator" not in rows[0]["terms"]
    held_out = rows[-1]["held_out"]
    assert held_out["ratio"] == pytest.approx(held_out["l1"] / held_out["repeat_l1"])
    assert {path.name for path in (run / "sheets").iterdir()} == {"0000004.png", "0000006.png"}
    assert np.asarray(Image.open(run / "curve.png")).std() > 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000004", "step-0000006"]
    assert (run / "recipe.toml").read_text() == recipe.text


def test_the_finished_model_loads_and_scores_what_the_log_says(
    recipe: Recipe, whole: tuple[Path, loop.Outcome]
) -> None:
    run, outcome = whole
    model = checkpoints.load(run / "model" / "model.pth.tar", run / "model" / "depth")
    assert (model.config.size, model.config.motion_scale) == (64, 0.25)
    clips = loop.data_sets(recipe, progress=False)[1]
    score = evaluate(model, clips, 2)
    assert outcome.held_out is not None
    assert score.l1 == pytest.approx(outcome.held_out.l1, rel=1e-5)
    # The same number by hand, one pair at a time.
    errors, repeats = [], []
    for clip, first, second in fixed_pairs(clips, 2):
        source, driving = (
            torch.from_numpy(frame.image.copy()).permute(2, 0, 1)[None] / 255.0
            for frame in clips.read(clip, (first, second))
        )
        with torch.no_grad():
            prediction = model(source, driving).prediction
        errors.append(float((prediction - driving).abs().mean()))
        repeats.append(float((source - driving).abs().mean()))
    assert score.l1 == pytest.approx(np.mean(errors), rel=1e-5)
    assert score.ratio == pytest.approx(np.mean(errors) / np.mean(repeats), rel=1e-5)


@pytest.mark.parametrize(("variant", "points"), [("fomm", 10), ("baseline", 15), ("dagan_sa", 15), ("dagan_spade", 15)])
def test_the_other_variants_train(
    cache: Path, tmp_path: Path, variant: str, points: int, recipe_text: Callable[..., str]
) -> None:
    with_depth = variant in ("dagan_sa", "dagan_spade")
    recipe = parse_recipe(recipe_text(cache, variant, points, disparity=5 if with_depth else 0))
    outcome = loop.train(recipe, tmp_path, steps=2, progress=False)
    assert outcome.step == 2 and (tmp_path / "checkpoints" / "step-0000002" / "depth").is_dir() == with_depth


def test_only_the_networks_a_stage_names_change(recipe: Recipe, tmp_path: Path) -> None:
    stage = dataclasses.replace(recipe.stages[0], networks=("generator",))
    trainer = loop.Trainer(dataclasses.replace(recipe, stages=(stage,)), tmp_path, progress=False)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.open_folder(resume=True)
    trainer.run(2, [])
    changed = {
        name.split(".")[0] for name, value in trainer.model.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"generator"}  # batch-norm statistics of the others included


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_weights(
    recipe: Recipe, tmp_path: Path, frozen: bool
) -> None:
    stage = dataclasses.replace(recipe.stages[0], freeze_norm=frozen)
    trainer = loop.Trainer(dataclasses.replace(recipe, stages=(stage,)), tmp_path, progress=False)
    before = {name: value.clone() for name, value in trainer.model.generator.state_dict().items()}
    trainer.open_folder(resume=True)
    trainer.run(2, [])
    after = trainer.model.generator.state_dict()
    same = {name.rpartition(".")[2] for name, value in after.items() if value.equal(before[name])}
    assert ("running_mean" in same, "running_var" in same) == (frozen, frozen)
    assert not after["first.norm.weight"].equal(before["first.norm.weight"])


def test_another_size_keeps_every_weight_but_the_anti_alias_filter(recipe: Recipe) -> None:
    model = Model(recipe.stage_config(recipe.stages[0]))
    other = loop.resized(model, recipe.stage_config(recipe.stages[1]))
    fresh = Model(other.config).state_dict()
    for name, value in other.state_dict().items():
        expected = fresh[name] if name.endswith("down.weight") else model.state_dict()[name]
        assert torch.equal(value, expected), name


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    real = training_steps.generator_losses

    def poisoned(*arguments: object, **named: object) -> object:
        terms, generated, points = real(*arguments, **named)  # type: ignore[arg-type]
        if trainer_step() >= 4:
            terms["pixel"] = terms["pixel"] * float("nan")
        return terms, generated, points

    rows_file = tmp_path / journal.LOG_NAME

    def trainer_step() -> int:
        return len(rows_file.read_text().splitlines()) if rows_file.exists() else 0

    monkeypatch.setattr(training_steps, "generator_losses", poisoned)
    strict = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, tolerate=1))
    with pytest.raises(
        loop.Diverged, match=r"stopped at step 5: the loss term pixel is no longer a finite number, 2 st"
    ):
        loop.train(strict, tmp_path, progress=False)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_fresh_refuses_a_folder_with_a_run(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path, steps=1, progress=False)
    with pytest.raises(InputError, match="already holds a run"):
        loop.train(recipe, tmp_path, resume=False, progress=False)


def test_another_networks_recipe_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path, steps=1, progress=False)
    wider = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, generator_width=6))
    with pytest.raises(InputError, match=r"trained with generator_width = 4, the recipe says 6"):
        loop.train(wider, tmp_path, progress=False)


def test_without_cuda_it_says_so(recipe: Recipe, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match="no CUDA device"):
        loop.train(recipe, tmp_path, device="cuda", progress=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_with_a_checkpoint_and_its_own_exit_code(
    cache: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    recipe_text: Callable[..., str],
    heed_interrupts: Callable[[], None],
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(recipe_text(cache).replace("steps = 4", "steps = 100000"))
    environment = os.environ | {"PYTHONPATH": str(Path(loop.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "dagan_rt", "train", "--recipe", str(file), "--out", str(tmp_path / "run"), "--quiet"],
        stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts,
    )  # fmt: skip
    log = tmp_path / "run" / journal.LOG_NAME
    killer = threading.Timer(300, process.kill)
    killer.start()
    try:
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.1)
        process.send_signal(number)
        message = process.communicate()[1]
    finally:
        killer.cancel()
        process.kill()
    assert process.returncode == code, message
    assert f"stopped by {number.name} at step" in message and "continue with: dagan-rt train" in message
    folder = latest_checkpoint(tmp_path / "run")
    assert folder is not None
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert folder.name == f"step-{last:07d}"


def test_a_log_cut_short_by_a_crash_is_read(tmp_path: Path) -> None:
    (tmp_path / journal.LOG_NAME).write_text('{"step": 1, "stage": "a", "terms": {"pixel": 2.0}}\n{"step": 2, "st')
    assert [row["step"] for row in journal.read_rows(tmp_path)] == [1]
    assert journal.plot(tmp_path).stat().st_size > 1000
    (tmp_path / journal.LOG_NAME).write_text("nonsense\n{}\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        journal.read_rows(tmp_path)


def command(*arguments: object) -> int:
    from dagan_rt.cli import main

    return main(["train", *map(str, arguments)])


def test_the_command_trains_plots_and_says_what_is_wrong(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe_text: Callable[..., str]
) -> None:
    file, run = tmp_path / "recipe.toml", tmp_path / "run"
    file.write_text(recipe_text(cache))
    assert command("--out", run) == 2 and "--recipe is missing" in capsys.readouterr().err
    assert command("--recipe", file, "--out", run, "--resume") == 2
    assert "holds no checkpoint to continue from" in capsys.readouterr().err
    assert command("--recipe", file, "--out", run, "--steps", 0) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
    assert command("--recipe", file, "--out", run, "--steps", 1, "--quiet") == 0
    assert "stopped at step 1 of 6, saved" in capsys.readouterr().out
    (run / "curve.png").unlink()
    assert command("--plot", run) == 0 and (run / "curve.png").exists()
    assert command("--recipe", file, "--out", run, "--fresh") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert command("--recipe", file, "--out", tmp_path / "clips", "--data", tmp_path / "nowhere") == 2
    assert "losses.landmark needs data whose truth is known" in capsys.readouterr().err
    assert command("--plot", tmp_path) == 2 and "log.jsonl does not exist" in capsys.readouterr().err


def test_a_stage_without_a_picture_hands_over_to_one_with(
    cache: Path, tmp_path: Path, recipe_text: Callable[..., str], weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    text = recipe_text(cache).replace('name = "coarse"', 'name = "coarse"\nnetworks = ["keypoints", "depth"]')
    recipe = parse_recipe(text.replace("steps = 4\n[[stage", "steps = 4\n[stage.losses]\npixel = 0\n[[stage"))
    loop.train(recipe, tmp_path / "whole", progress=False)
    for steps in (2, 4, 6):
        loop.train(recipe, tmp_path / "parts", steps=steps, progress=False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    terms = [set(row["terms"]) for row in journal.read_rows(tmp_path / "whole")]
    assert "pixel" not in terms[0] and "pixel" in terms[-1]
