"""Two processes that share each batch end where one process with all of it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dagan_rt.errors import InputError
from dagan_rt.training import journal, loop
from dagan_rt.training.distributed import SyncBatchNorm2d, World, batch_norms
from dagan_rt.training.recipe import parse_recipe
from dagan_rt.training.saving import latest_checkpoint

ROOT = Path(loop.__file__).parents[2]
RECIPE = """
[network]
variant = "dagan"
{network}
[data]
kind = "heads"
cache = "{cache}"
identities = 4
frames = 4
held_out = 2
held_out_pairs = 2
[training]
batch = 4
learning_rate = 1e-4
clip_gradient = 10.0
ema = 0.9
threads = 1
device = "cpu"
log_every = 1
checkpoint_every = {every}
[losses]
perceptual = 0
pixel = 10
landmark = 10
disparity = 5
[[stage]]
name = "all"
steps = {steps}
"""


def torchrun(recipe: Path, out: Path, processes: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "dagan_rt", "train", "--recipe", str(recipe), "--out", str(out), "--quiet",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=400)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_network: str) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(RECIPE.format(network=tiny_network, cache=tmp_path_factory.mktemp("heads"), steps=4, every=100))
    return file


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joint_batch(recipe: Path, tmp_path: Path) -> None:
    loop.train(parse_recipe(recipe.read_text()), tmp_path / "one", progress=False)
    process = torchrun(recipe, tmp_path / "two")
    output = finished(process)
    assert process.returncode == 0, output
    one, two = (journal.read_rows(tmp_path / run) for run in ("one", "two"))
    assert len(one) == len(two) == 4 and "discriminator" in one[0]["terms"] and "equivariance_value" in one[0]["terms"]
    for number, (alone, together) in enumerate(zip(one, two, strict=True)):
        assert together["terms"] == pytest.approx(alone["terms"], rel=2e-6 if number == 0 else 2e-4)
    expected, got = (
        torch.load(tmp_path / run / "model" / "model.pth.tar", weights_only=True) for run in ("one", "two")
    )
    apart, count = 0, 0
    for network in ("generator", "kp_detector", "discriminator"):
        for name, value in expected[network].items():
            if "running" in name:
                assert torch.allclose(got[network][name], value, rtol=1e-4, atol=5e-4), (
                    name
                )  # biases, below, move the means
            elif not name.endswith("conv.bias"):  # batch norm takes a bias before it away: it moves at random
                difference = (got[network][name] - value).abs()
                assert difference.max() < 4.1e-4, name
                apart, count = apart + int((difference > 2e-6).sum()), count + value.numel()
    # Adam moves a weight by up to the rate (1e-4) a step however small its gradient, so rounding decides some of them.
    assert apart < 0.02 * count, (apart, count)
    assert two[-1]["held_out"]["l1"] == pytest.approx(one[-1]["held_out"]["l1"], rel=1e-4)


@pytest.mark.slow
def test_sigterm_saves_and_another_number_of_processes_continues(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("steps = 4", "steps = 100000")
    endless, run = tmp_path / "endless.toml", tmp_path / "run"
    endless.write_text(text)
    process = torchrun(endless, run)
    log = run / journal.LOG_NAME
    deadline = time.monotonic() + 300
    while process.poll() is None and not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    output = finished(process)
    newest = latest_checkpoint(run)
    assert newest is not None, output
    assert "stopped by SIGTERM" in output and "Traceback" not in output.split("stopped by SIGTERM")[0]
    step = int(newest.name.removeprefix("step-"))
    outcome = loop.train(parse_recipe(text), run, steps=step + 1, progress=False)  # by one process
    assert outcome.step == step + 1


def normalised(rank: int, world: int, port: int, folder: str) -> None:
    """One process of the test below: its part of the batch, and the gradients of a loss of it, to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    shared = World.join("cpu")
    norm = shared.synchronized(nn.Sequential(nn.BatchNorm2d(3)))[0]
    x, weight = batch()
    part = slice(rank * 2, rank * 2 + 2)
    mine = x[part].clone().requires_grad_()
    output = norm(mine)
    (output * weight[part]).mean().backward()
    norm.eval()
    result = {
        "y": output.detach(),
        "x": mine.grad,
        "w": norm.weight.grad,
        "b": norm.bias.grad,
        "eval": norm(x).detach(),
    }
    torch.save(result | {"kind": type(norm).__name__, "most": shared.greatest(rank, 7 - rank)}, f"{folder}/{rank}.pth")
    shared.leave()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 4, generator=generator) * 2 + torch.arange(3.0)[:, None, None] * 10
    return x, torch.randn(4, 3, 5, 4, generator=generator)


@pytest.mark.slow
def test_sync_batch_norm_equals_batch_norm_of_the_whole_batch(tmp_path: Path) -> None:
    import socket

    import torch.multiprocessing as processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # By name, for the other processes import it afresh.
    processes.spawn(normalised, (2, port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    x, weight = batch()
    x, norm = x.double().requires_grad_(), nn.BatchNorm2d(3).double()
    y = norm(x)
    (y * weight.double()).mean().backward()
    norm.eval()
    assert parts[0]["kind"] == "SyncBatchNorm2d" and parts[0]["most"] == parts[1]["most"] == [1, 7]
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(torch.cat([part["y"] for part in parts]).double(), y, **close)
    # Each process takes the mean over its half: gradients by x are twice those of the mean over all.
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    assert torch.allclose(torch.cat([part["x"] for part in parts]).double() / 2, x.grad, **close)
    for name, gradient in (("w", norm.weight.grad), ("b", norm.bias.grad)):
        assert torch.allclose((parts[0][name] + parts[1][name]).double() / 2, gradient, **close)
    assert torch.allclose(parts[0]["eval"].double(), norm(x), **close) and torch.equal(
        parts[0]["eval"], parts[1]["eval"]
    )


def test_one_process_has_nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = World.join("cpu")
    assert (world.rank, world.size, world.first, world.share(5)) == (0, 1, True, 5)
    assert world.greatest(3, 4) == [3, 4]
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert world.synchronized(network) is network and type(network[1]) is nn.BatchNorm2d
    assert world.together(network) is network
    world.wait()
    world.leave()


def test_bad_environments_and_batches() -> None:
    with pytest.raises(InputError, match="batch must be a multiple of the 4 processes that share it, got 6"):
        World(torch.device("cpu"), 1, 4).share(6)
    with pytest.raises(InputError, match="device must be auto, cpu or cuda, got 'meta'"):
        World.join("meta")


def test_an_environment_that_torchrun_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE must be a whole number, as torchrun sets it, got 'two'"):
        World.join("cpu")


def test_every_batch_norm_is_found() -> None:
    network = nn.Sequential(nn.BatchNorm2d(1), SyncBatchNorm2d(1), nn.SyncBatchNorm(1), nn.InstanceNorm2d(1))
    assert len(batch_norms(network)) == 3
