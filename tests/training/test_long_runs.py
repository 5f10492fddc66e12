"""What a long run meets: half precision, averaged weights, a step that is not a number, a full disk, given weights."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dagan_rt import checkpoints
from dagan_rt.errors import InputError
from dagan_rt.networks.model import Model
from dagan_rt.training import journal, loop, saving, steps
from dagan_rt.training.average import Average
from dagan_rt.training.recipe import Recipe, StartRecipe, parse_recipe

Weights = Callable[[Path], dict[str, torch.Tensor]]


def changed(recipe: Recipe, **training: Any) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))


def test_the_average_of_weights_is_the_sum_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    average = Average(model, 0.9)
    seen = [model.weight.detach().clone()]
    for _ in range(20):
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
        seen.append(model.weight.detach().clone())
        average.update(model)
    wanted = seen[0]
    for n, value in enumerate(seen[1:]):
        decay = min(0.9, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * value
    own = model.weight.detach().clone()
    with average.applied(model):
        assert torch.allclose(model.weight, wanted, rtol=1e-12)
    assert torch.equal(model.weight, own)


def test_averaged_weights_are_measured_kept_and_continued_exactly(
    recipe: Recipe, tmp_path: Path, weights: Weights
) -> None:
    averaged = changed(recipe, ema=0.9)
    outcome = loop.train(averaged, tmp_path / "whole", progress=False)
    for number in (3, 4, 6):  # inside a stage, at its end, in the next, whose size is another
        loop.train(averaged, tmp_path / "parts", steps=number, progress=False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert any("average" in name for name in whole)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    folder = tmp_path / "whole" / "model"
    final = checkpoints.load(folder / "model.pth.tar", folder / "depth")
    kept = torch.load(saving.latest_checkpoint(tmp_path / "whole") / "model.pth.tar", weights_only=True)  # type: ignore[operator]
    name = "first.conv.weight"
    assert torch.equal(final.generator.state_dict()[name], kept["average"]["values"][f"generator.{name}"])
    assert not torch.equal(final.generator.state_dict()[name], kept["generator"][name])
    held_out = loop.data_sets(averaged, progress=False)[1]
    assert outcome.held_out is not None
    assert outcome.held_out.l1 == pytest.approx(loop.evaluate(final, held_out, 2).l1, rel=1e-5)


def test_a_run_without_an_average_cannot_be_continued_with_one(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(recipe, tmp_path, steps=1, progress=False)
    with pytest.raises(InputError, match="has no entry 'average', which the recipe needs"):
        loop.train(changed(recipe, ema=0.9), tmp_path, progress=False)


@pytest.mark.parametrize(("precision", "close"), [("bf16", 0.05), pytest.param("fp16", 0.01, marks=pytest.mark.slow)])
def test_half_precision_follows_single_and_continues_exactly(
    recipe: Recipe, whole: tuple[Path, loop.Outcome], tmp_path: Path, weights: Weights, precision: str, close: float
) -> None:
    half = changed(recipe, precision=precision)
    loop.train(half, tmp_path / "whole", progress=False)
    loop.train(half, tmp_path / "parts", steps=3, progress=False)
    loop.train(half, tmp_path / "parts", progress=False)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    single = journal.read_rows(whole[0])[0]["terms"]
    first = journal.read_rows(tmp_path / "whole")[0]["terms"]
    assert first == pytest.approx(single, rel=close) and first != single
    assert all(value.dtype != torch.float16 and value.dtype != torch.bfloat16 for value in one.values())


def test_fp16_leaves_out_steps_that_overflow_and_finds_its_scale() -> None:
    part = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(part.parameters(), lr=1.0)
    mover = steps.Mover({"a": part}, {"a": optimizer}, "fp16", 0.0, torch.device("cpu"))
    before, scale = part.weight.item(), mover.scaler.get_scale()
    loss = part(torch.ones(1, 1)).sum()
    assert mover.move({"x": loss * float("inf")}, ["a"]) is None
    assert part.weight.item() == before and mover.scaler.get_scale() == scale / 2
    assert mover.move({"x": part(torch.full((1, 1), 0.25)).sum()}, ["a"]) is None
    assert part.weight.item() == pytest.approx(before - 0.25)


def test_a_gradient_that_is_not_a_number_moves_no_network() -> None:
    parts = {name: nn.Linear(1, 1, bias=False) for name in ("a", "b")}
    optimizers = {name: torch.optim.SGD(part.parameters(), lr=1.0) for name, part in parts.items()}
    mover = steps.Mover(parts, optimizers, "fp32", 0.0, torch.device("cpu"))
    before = [part.weight.item() for part in parts.values()]
    x = torch.ones(1, 1)
    bad = (parts["b"](x) - parts["b"](x)).sum().sqrt()  # 0, with a gradient of infinity times nothing
    assert mover.move({"good": parts["a"](x).sum(), "bad": bad}, ["a", "b"]) == "gradient of the b network"
    assert [part.weight.item() for part in parts.values()] == before


def test_one_bad_step_is_left_out_as_if_it_had_not_been(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = loop.Trainer(changed(recipe, ema=0.5), tmp_path, progress=False)
    trainer.open_folder(resume=True)
    trainer.run(2, [])
    real = steps.generator_losses

    def poisoned(model: Model, batch: dict[str, torch.Tensor], *arguments: Any) -> Any:
        if trainer.step == 2:  # a batch that is not a number: the statistics of batch norm get there, too
            batch = {name: value * float("nan") if value.dim() == 4 else value for name, value in batch.items()}
        return real(model, batch, *arguments)

    monkeypatch.setattr(steps, "generator_losses", poisoned)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    averages = {name: value.clone() for name, value in trainer.average.values.items()}  # type: ignore[union-attr]
    trainer.run(3, [])
    after = trainer.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name]) and "num_batches" not in name] == []
    assert all(torch.equal(value, trainer.average.values[name]) for name, value in averages.items())  # type: ignore[union-attr]
    row = journal.read_rows(tmp_path)[-1]
    assert (row["step"], row["left_out"], row["terms"]) == (3, 1, {})
    trainer.run(4, [])
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert "left_out" not in journal.read_rows(tmp_path)[-1]


def test_a_full_disk_in_the_middle_is_told_and_survived_but_not_at_the_end(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    real = saving.save

    def save(path: Path, *arguments: Any, **named: Any) -> None:
        if "0000003" in str(path) or "0000004" in str(path):
            path.write_bytes(b"half")
            raise full
        real(path, *arguments, **named)

    monkeypatch.setattr(saving, "save", save)
    with pytest.warns(
        UserWarning, match="step 3: a checkpoint could not be written, training goes on: .*No space left"
    ):
        loop.train(recipe, tmp_path / "run", progress=False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000006"]
    with pytest.raises(OSError, match="No space left"):
        loop.train(recipe, tmp_path / "short", steps=4, progress=False)
    assert list((tmp_path / "short" / "checkpoints").iterdir()) == []


def test_half_a_row_is_taken_out_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append_row(tmp_path, {"step": 1})

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    import builtins

    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *given, **named: Full(real(*given, **named)))
    with pytest.raises(OSError, match="No space left"):
        journal.append_row(tmp_path, {"step": 2})
    monkeypatch.undo()
    journal.append_row(tmp_path, {"step": 3})
    assert [row["step"] for row in journal.read_rows(tmp_path)] == [1, 3]


def test_checkpoints_by_the_clock(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 100_000, 40))  # each look at the clock is 40 seconds after the one before
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(now)))
    kept: list[str] = []
    real = loop.save_checkpoint

    def save(*arguments: Any) -> Path:
        kept.append(real(*arguments).name)
        return tmp_path

    monkeypatch.setattr(loop, "save_checkpoint", save)
    loop.train(changed(recipe, checkpoint_minutes=2.0, checkpoint_every=1000), tmp_path, progress=False)
    assert kept == ["step-0000003", "step-0000004", "step-0000006"]  # due after three looks; stages' ends


def test_tensorboard_has_the_curves_and_forgets_what_is_trained_again(recipe: Recipe, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop.train(recipe, tmp_path, steps=5, progress=False)
    import shutil

    shutil.rmtree(tmp_path / "checkpoints" / "step-0000005")  # what came after the older checkpoint is lost
    loop.train(recipe, tmp_path, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = {row["step"]: row for row in journal.read_rows(tmp_path)}
    assert {"loss/pixel", "loss/landmark", "held out/ratio", "run/samples_per_second"} <= set(events.Tags()["scalars"])
    pixel = {event.step: event.value for event in events.Scalars("loss/pixel")}
    assert pixel == pytest.approx({step: row["terms"]["pixel"] for step, row in rows.items()}, rel=1e-6)
    assert events.Tags()["images"] == ["held out"]


def test_no_tensorboard_where_it_is_not_wanted(recipe: Recipe, tmp_path: Path) -> None:
    loop.train(changed(recipe, tensorboard=False), tmp_path, steps=1, progress=False)
    assert not (tmp_path / "tensorboard").exists()


def test_a_recipe_begins_with_given_weights_of_any_size(
    recipe: Recipe, whole: tuple[Path, loop.Outcome], tmp_path: Path
) -> None:
    folder = whole[0] / "model"
    given = checkpoints.load(folder / "model.pth.tar", folder / "depth")
    both = StartRecipe(str(folder / "model.pth.tar"), str(folder / "depth"))
    fresh = loop.Trainer(recipe, tmp_path, progress=False).model
    started = loop.Trainer(dataclasses.replace(recipe, start=both), tmp_path, progress=False).model
    depth = loop.Trainer(
        dataclasses.replace(recipe, start=StartRecipe(depth=both.depth)), tmp_path, progress=False
    ).model
    assert (given.config.size, started.config.size) == (64, 32)
    for name, value in given.state_dict().items():
        if not name.endswith("down.weight"):
            assert torch.equal(started.state_dict()[name], value), name
            same = given if name.startswith("depth.") else fresh
            assert torch.equal(depth.state_dict()[name], same.state_dict()[name]), name


def test_given_weights_of_other_networks_are_refused(
    recipe: Recipe, whole: tuple[Path, loop.Outcome], tmp_path: Path
) -> None:
    folder = whole[0] / "model"
    wider = dataclasses.replace(recipe, network=dataclasses.replace(recipe.network, generator_width=6, depth_width=8))
    start = StartRecipe(str(folder / "model.pth.tar"), str(folder / "depth"))
    with pytest.raises(
        InputError, match="trained with depth_width = 4, the recipe says 8; start with weights of those"
    ):
        loop.Trainer(dataclasses.replace(wider, start=start), tmp_path, progress=False)
    with pytest.raises(InputError, match="depth_encoder entry encoder.conv1.weight must be"):
        loop.Trainer(dataclasses.replace(wider, start=StartRecipe(depth=start.depth)), tmp_path, progress=False)
    with pytest.raises(InputError, match="nowhere"):
        loop.Trainer(dataclasses.replace(recipe, start=StartRecipe(model="nowhere.pth")), tmp_path, progress=False)


def test_time_spent_waiting_for_data_is_in_the_log(recipe: Recipe, tmp_path: Path) -> None:
    trainer = loop.Trainer(recipe, tmp_path, progress=False)
    trainer.open_folder(resume=True)
    batches = trainer.loader.from_step

    def slow(step: int) -> Any:
        import time

        for batch in batches(step):
            time.sleep(0.3)
            yield batch

    trainer.loader.from_step = slow  # type: ignore[method-assign]
    trainer.run(2, [])
    rows = journal.read_rows(tmp_path)
    assert rows[0]["waiting"] * rows[0]["seconds"] == pytest.approx(0.3, abs=0.15)
    assert all(0.0 < row["waiting"] < 1.0 for row in rows) and np.isfinite(rows[0]["samples_per_second"])


def test_clips_that_turn_bad_on_the_way_are_counted(tmp_path: Path, recipe: Recipe) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for clip in range(3):
        (tmp_path / "data" / f"clip{clip}").mkdir(parents=True)
        for frame in range(3):
            picture = rng.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / f"clip{clip}" / f"{frame}.png")
    data = dataclasses.replace(recipe.data, kind="clips", path=str(tmp_path / "data"), held_out=0, identities=1)
    losses = dataclasses.replace(recipe.stages[0].losses, landmark=0.0, disparity=0.0)
    stage = dataclasses.replace(recipe.stages[0], losses=losses)
    trainer = loop.Trainer(dataclasses.replace(recipe, data=data, stages=(stage,)), tmp_path / "run", progress=False)
    trainer.open_folder(resume=True)
    for file in (tmp_path / "data" / "clip1").iterdir():
        file.write_bytes(b"no picture any more")
    with pytest.warns(UserWarning, match="clip skipped: clip1"):
        trainer.run(4, [])
    assert list(trainer.bad_clips) == ["clip1"] and journal.read_rows(tmp_path / "run")[-1]["bad_clips"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_places_keep_their_digits_in_half_precision(recipe: Recipe, dtype: torch.dtype) -> None:
    """In 16 bits a place would be off by a quarter of a pixel at 256, however good the networks are."""
    torch.manual_seed(0)
    model = Model(recipe.network).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        points = model.find_keypoints(image)
        motion = model(image, image.flip(3)).motion
    for places in (points.value, points.jacobian, motion.flow):
        assert places.dtype == torch.float32 and not torch.equal(places, places.to(dtype).float())


DEPTH_FIRST = """
[[stage]]
name = "geometry"
steps = 3
neighbours = 2
networks = ["depth", "pose"]
[stage.losses]
photometric = 1
smoothness = 1e-3
"""


@pytest.mark.slow
def test_depth_trains_alone_first_and_stays_as_it_is(
    cache: Path, recipe_text: Callable[..., str], tmp_path: Path, weights: Weights
) -> None:
    head, stages = recipe_text(cache, disparity=0).split("[[stage]]", 1)
    recipe = parse_recipe(head + DEPTH_FIRST + "[[stage]]" + stages)
    loop.train(recipe, tmp_path / "whole", progress=False)
    for number in (2, 3, 4, 9):
        loop.train(recipe, tmp_path / "parts", steps=number, progress=False)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert any("pose" in name for name in one)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = journal.read_rows(tmp_path / "whole")
    assert set(rows[0]["terms"]) == {"photometric", "smoothness"} and "pixel" in rows[-1]["terms"]
    assert set(rows[2]["held_out"]) == {"correlation", "ratio"} and "l1" in rows[-1]["held_out"]
    fresh = loop.Trainer(recipe, tmp_path / "fresh", progress=False).model
    trained = checkpoints.load(tmp_path / "whole" / "model" / "model.pth.tar", tmp_path / "whole" / "model" / "depth")
    after_depth = loop.Trainer(recipe, tmp_path / "again", progress=False)
    after_depth.open_folder(resume=True)
    after_depth.run(3, [])
    for name, value in trained.depth.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, after_depth.model.depth.state_dict()[name]), name  # type: ignore[union-attr]
    key = "encoder.encoder.conv1.weight"
    assert not torch.equal(trained.depth.state_dict()[key], fresh.depth.state_dict()[key])  # type: ignore[union-attr]


def test_a_run_of_depth_alone_leaves_the_pair_of_files(
    cache: Path, recipe_text: Callable[..., str], tmp_path: Path
) -> None:
    head = recipe_text(cache).split("[[stage]]", 1)[0]
    loop.train(parse_recipe(head + DEPTH_FIRST), tmp_path, progress=False)
    files = {path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*.*")}
    assert files == {"depth/encoder.pth", "depth/depth.pth"}
