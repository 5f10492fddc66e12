"""Recipes: what is read, what is refused and in which words, and the schedules."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dagan_rt.errors import InputError
from dagan_rt.networks.config import NetworkConfig
from dagan_rt.training.losses import LossWeights
from dagan_rt.training.recipe import TRAINABLE, LearningRates, parse_recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
SMALLEST = '[[stage]]\nname = "all"\nsteps = 10\n'


def test_the_published_hyper_parameters() -> None:
    recipe = read_recipe(RECIPES / "vox-256.toml")
    assert recipe.network == NetworkConfig()
    assert recipe.training.betas == (0.5, 0.999)
    (stage,) = recipe.stages
    assert stage.learning_rate == LearningRates.from_number(2e-4)
    assert (stage.batch, stage.epochs, recipe.data.repeats, stage.milestones) == (96, 150, 75, (60, 90))
    assert stage.losses == LossWeights()
    assert "depth" not in stage.networks
    items = 1000 * 75
    assert stage.length(items) == 150 * items // 96
    epoch = items / 96
    rates = [stage.rate_factor(round(epoch * at), items) for at in (0, 59.9, 60.1, 89.9, 90.1, 149)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_demo_recipe_reads() -> None:
    recipe = read_recipe(RECIPES / "demo.toml")
    assert recipe.data.kind == "heads"
    assert recipe.stages[-1].size == recipe.largest_size == recipe.network.size


def test_a_stage_overrides_and_the_rest_comes_from_the_recipe() -> None:
    recipe = parse_recipe(
        """
        [training]
        batch = 5
        learning_rate = {generator = 1e-3, depth = 2}
        [losses]
        pixel = 3
        perceptual = 0
        [[stage]]
        name = "a"
        steps = 7
        [[stage]]
        name = "b"
        steps = 8
        size = 64
        motion_scale = 0.5
        batch = 6
        learning_rate = 1e-4
        networks = ["depth"]
        losses = {pixel = 4}
        """
    )
    a, b = recipe.stages
    assert (a.size, a.motion_scale, a.batch, a.networks) == (256, 0.25, 5, TRAINABLE)
    assert a.learning_rate == LearningRates(generator=1e-3, depth=2.0)
    assert (b.size, b.motion_scale, b.batch, b.networks) == (64, 0.5, 6, ("depth",))
    assert b.learning_rate == LearningRates.from_number(1e-4)
    assert (a.losses.pixel, b.losses.pixel, b.losses.perceptual, b.losses.generator_gan) == (3, 4, 0, 1)
    assert recipe.stage_config(b).size == 64 and recipe.stage_config(b).motion_scale == 0.5


def test_cosine_and_warmup() -> None:
    (stage,) = parse_recipe(
        '[[stage]]\nname = "a"\nsteps = 100\nschedule = "cosine"\nfinal = 0.2\nwarmup = 10\n'
    ).stages
    assert stage.rate_factor(0, 1) == pytest.approx(0.1)
    assert stage.rate_factor(50, 1) == pytest.approx(0.6)
    assert stage.rate_factor(100, 1) == pytest.approx(0.2)
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    assert stage.rate_factor(25, 1) == pytest.approx(quarter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"recipe: expected at least one \[\[stage\]\] table, got none"),
        ("stage = 3", r"at least one \[\[stage\]\] table"),
        ("a = [", r"recipe is not valid TOML"),
        ("colour = 1\n" + SMALLEST, r"recipe: colour is not a known key; expected one of network, data"),
        ("data = 1\n" + SMALLEST, r"recipe: \[data\] must be a table, got int"),
        ("[network]\nwidth = 1\n" + SMALLEST, r"recipe: \[network\] network config has no entry 'width'"),
        ("[training]\nbatch = 1.5\n" + SMALLEST, r"training.batch must be int, got float 1.5"),
        ("[training]\nbatch = true\n" + SMALLEST, r"training.batch must be int, got bool"),
        ("[training]\nlearning_rate = -1\n" + SMALLEST, r"learning_rate.generator must be finite and not negative"),
        ("[training]\nlearning_rate = nan\n" + SMALLEST, r"must be finite and not negative, got nan"),
        ("[training]\nlearning_rate = {lips = 1}\n" + SMALLEST, r"training.learning_rate.lips is not a known key"),
        ("[training]\nbetas = [0.5]\n" + SMALLEST, r"training.betas must be a list of 2 float, got \[0.5\]"),
        ("[training]\nkeep = 0\n" + SMALLEST, r"training.keep must be at least 1"),
        ("[training]\nprecision = 'fp8'\n" + SMALLEST, r"precision must be fp32, bf16 or fp16, got 'fp8'"),
        ("[data]\nkind = 'movies'\n" + SMALLEST, r"data.kind must be heads or clips, got 'movies'"),
        ("[data]\nframes = 1\n" + SMALLEST, r"data.frames must be at least 2, got 1"),
        ("[data]\nfirst_identity = 999999\nidentities = 2\n" + SMALLEST, r"must stay within 0 to 999999"),
        ("[losses]\npixels = 1\n" + SMALLEST, r"losses.pixels is not a known key"),
        ("[[stage]]\nsteps = 1\n", r"stage\[0\] has no name"),
        ("[[stage]]\nname = 'a'\n", r"stage\[0\] must give either steps or epochs"),
        ("[[stage]]\nname = 'a'\nsteps = 1\nepochs = 1\n", r"must give either steps or epochs"),
        (SMALLEST + "schedule = 'linear'\n", r"stage\[0\].schedule must be constant, cosine or milestones"),
        (SMALLEST + "networks = ['ears']\n", r"stage\[0\].networks.ears is not a known key; expected one of generator"),
        (SMALLEST + "size = 100\n", r"stage\[0\] size must be a multiple of 32"),
        (SMALLEST + "still = 1.5\n", r"stage\[0\].still must be between 0 and 1, got 1.5"),
        (SMALLEST + "batch = 5000\n", r"stage\[0\].batch must be between 1 and 4096"),
        (SMALLEST + "losses = {pixel = 'much'}\n", r"stage\[0\].losses.pixel must be float, got str 'much'"),
        (
            "[data]\nkind = 'clips'\n" + SMALLEST + "losses = {landmark = 1}\n",
            r"stage 'all': losses.landmark needs data whose truth is known",
        ),
        (
            "[network]\nnum_keypoints = 12\n[losses]\nlandmark = 1\n" + SMALLEST,
            r"needs num_keypoints = 15 or 10, got 12",
        ),
        ("[network]\nvariant = 'fomm'\n[losses]\ndisparity = 1\n" + SMALLEST, r"fomm: it has no depth network"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value).strip()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.toml cannot be read"):
        read_recipe(tmp_path / "nothing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes.toml cannot be read"):
        read_recipe(tmp_path / "bytes.toml")


def test_images_too_small_for_the_hourglasses_are_refused() -> None:
    text = '[network]\nsize = 64\n{more}[[stage]]\nname = "a"\nsteps = 1'
    for more in ("motion_blocks = 4\n", "motion_blocks = 4\nkeypoint_blocks = 5\nmotion_scale = 0.25\n"):
        with pytest.raises(InputError, match="multiple of 32 for keypoint_blocks = 5, got 64 × 0.25 = 16"):
            parse_recipe(text.format(more=more))
    parse_recipe(text.format(more="motion_blocks = 4\nkeypoint_blocks = 4\n"))
    parse_recipe(text.format(more="motion_scale = 0.5\n"))


DEPTH = """
[network]
variant = "dagan"
[data]
frames = {frames}
[[stage]]
name = "geometry"
steps = 10
neighbours = {neighbours}
networks = ["depth", "pose"]
[stage.losses]
photometric = 1
smoothness = 1e-3
{more}
[[stage]]
name = "rest"
steps = 10
"""


def test_a_stage_of_depth_alone_computes_nothing_else_and_the_next_one_does() -> None:
    first, second = parse_recipe(DEPTH.format(frames=16, neighbours=2, more="")).stages
    assert (first.trained, first.neighbours) == (("depth", "pose"), 2)
    assert first.losses.others_than_depth == [] and not first.losses.uses_image and not first.losses.uses_transform
    assert second.losses == LossWeights() and "pose" not in second.trained and second.neighbours == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": 0}, "photometric needs neighbours, 1 or more frames, got 0"),
        ({"frames": 2}, "needs data.frames of at least 3, got 2"),
        ({"more": "landmark = 1"}, "trains depth alone: set losses.landmark to 0 there"),
        ({"more": '[[stage]]\nname = "b"\nsteps = 1\nneighbours = 1'}, "neighbours belongs to losses.photometric"),
        (
            {"more": '[[stage]]\nname = "b"\nsteps = 1\n[stage.losses]\nconsistency = 1'},
            "losses.consistency belongs to losses.photometric, which is 0",
        ),
        ({"variant": "fomm"}, "photometric must be 0 for fomm: it has no depth network"),
    ],
)
def test_what_does_not_fit_depth_alone_is_named(change: dict[str, object], message: str) -> None:
    text = DEPTH.format(**{"frames": 16, "neighbours": 2, "more": ""} | change)
    with pytest.raises(InputError, match=message):
        parse_recipe(text.replace("dagan", str(change.get("variant", "dagan"))))


def test_the_discriminator_trains_only_where_it_has_something_to_teach() -> None:
    text = SMALLEST + "[stage.losses]\ngenerator_gan = {}\nfeature_matching = 0"
    assert "discriminator" in parse_recipe(text.format(1)).stages[0].trained
    assert "discriminator" not in parse_recipe(text.format(0)).stages[0].trained


def test_given_weights_must_fit_the_variant() -> None:
    with pytest.raises(InputError, match="start.depth must be left out for fomm: it has no depth network"):
        parse_recipe('[network]\nvariant = "fomm"\n[start]\ndepth = "somewhere"\n' + SMALLEST)
    assert parse_recipe('[start]\ndepth = "somewhere"\n' + SMALLEST).start.depth == "somewhere"


def test_an_average_must_forget() -> None:
    with pytest.raises(InputError, match="training.ema must be below 1, such as 0.999, got 1.0"):
        parse_recipe("[training]\nema = 1.0\n" + SMALLEST)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_reads_and_its_resolved_text_reads_the_same(path: Path) -> None:
    recipe = read_recipe(path)
    again = parse_recipe(recipe.text)
    assert (again.network, again.data, again.training, again.stages) == (
        recipe.network, recipe.data, recipe.training, recipe.stages,
    )  # fmt: skip


def test_clips_from_nothing_are_the_two_published_trainings_in_one() -> None:
    whole, depth, rest = (read_recipe(RECIPES / f"{name}.toml") for name in ("clips-256", "depth-vox", "vox-256"))
    assert whole.network == rest.network and whole.stages[1] == rest.stages[0]
    first, alone = whole.stages[0], depth.stages[0]
    assert (first.losses, first.neighbours, first.epochs) == (alone.losses, alone.neighbours, alone.epochs)
    assert first.learning_rate == alone.learning_rate
