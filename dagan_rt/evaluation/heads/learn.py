"""Training the regressors: landmarks and pose on one trunk, actions on what those find, identity on a copy of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dagan_rt.evaluation.heads.degrade import degrade
from dagan_rt.evaluation.heads.frames import Frames
from dagan_rt.evaluation.heads.moving import WARP, Batch, move
from dagan_rt.evaluation.heads.networks import Actions, Geometry, Identity, distance
from dagan_rt.evaluation.heads.targets import activations, person_signs, person_vector

MEAN, DEVIATION = 0.5, 0.25  # of the pixels, roughly: (pixel / 255 - MEAN) / DEVIATION goes in
TEMPERATURE = 0.1  # of the contrast between identities
VARIANTS = 2  # degraded copies of each training frame
# Of the 68 landmarks: jaw, brows, nose, eyes, mouth.
PARTS = [slice(0, 17), slice(17, 22), slice(22, 27), slice(27, 36), slice(36, 42), slice(42, 48), slice(48, 68)]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW with a linear rise, then a cosine fall to nothing."""

    steps: int
    batch: int
    rate: float = 4e-3
    warmup: int = 100
    decay: float = 1e-4


class Pool:
    """Training frames with degraded copies, as batches: `variants` copies beside the clean one, each drawn once."""

    def __init__(self, frames: Frames, seed: int, variants: int = VARIANTS, progress: bool = False) -> None:
        self.frames = frames
        self.images = np.empty((1 + variants, *frames.images.shape), np.uint8)
        self.images[0] = frames.images
        for variant in range(variants):
            rng = np.random.default_rng([seed, variant])
            for number in tqdm(range(len(frames)), desc="degrading", unit="frame", disable=not progress):
                self.images[1 + variant, number] = degrade(frames.images[number], rng)
        self.landmarks, self.pose = torch.from_numpy(frames.landmarks), torch.from_numpy(frames.pose)
        self.actions = torch.from_numpy(activations(frames.expression))

    def batch(self, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
        """Frames by number, each clean or in one of its degraded copies."""
        images = self.images[rng.integers(len(self.images), size=len(numbers)), numbers]
        chosen = torch.from_numpy(numbers)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return Batch(pixels, self.landmarks[chosen], self.pose[chosen], self.actions[chosen])


def train_geometry(pool: Pool, schedule: Schedule, seed: int, log: list[dict[str, Any]]) -> Geometry:
    """Landmarks and pose from single frames; rows of the mean loss terms go into `log`."""
    torch.manual_seed(seed)
    network = Geometry()
    network.landmarks.set_units(pool.landmarks.flatten(1))
    network.pose.set_units(pool.pose)
    spread = _shape(pool.landmarks).std(0)
    batches = _moved(pool, schedule.batch, seed, WARP)

    def losses() -> dict[str, Tensor]:
        truth = next(batches)
        landmarks, pose = network(normalised(truth.images))
        return {
            "landmarks": network.landmarks.distance(landmarks.flatten(1), truth.landmarks.flatten(1)),
            "shape": distance(_shape(landmarks), _shape(truth.landmarks), spread),
            "pose": network.pose.distance(pose, truth.pose),
        }

    _descend(network, losses, schedule, "geometry", log)
    return network


def train_actions(pool: Pool, geometry: Geometry, schedule: Schedule, seed: int, log: list[dict[str, Any]]) -> Actions:
    """Activations from what `geometry`, which stays as it is, finds in single frames."""
    torch.manual_seed(seed)
    network = Actions(geometry)
    network.head.set_units(pool.actions)
    batches = _moved(pool, schedule.batch, seed + 1, 0.0)

    def losses() -> dict[str, Tensor]:
        truth = next(batches)
        return {"actions": network.head.distance(network(normalised(truth.images)), truth.actions)}

    _descend(network, losses, schedule, "actions", log)
    return network


def _moved(pool: Pool, count: int, seed: int, warp: float) -> Iterator[Batch]:
    """Batches of `count` frames without end, half of them mirrored, all of them moved a little, see `move`."""
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    numbers = _endless(len(pool.frames), rng)
    while True:
        chosen = np.array([next(numbers) for _ in range(count)])
        mirrored = torch.rand(count, generator=generator) < 0.5
        yield move(pool.batch(chosen, rng), mirrored, generator, warp)


def _shape(landmarks: Tensor) -> Tensor:
    """Each part of the face about its own middle, [B, 68, 2]: what opens and widens, wherever the face is."""
    return torch.cat([landmarks[:, part] - landmarks[:, part].mean(1, keepdim=True) for part in PARTS], 1)


def train_identity(
    pool: Pool, start: Geometry | None, schedule: Schedule, seed: int, log: list[dict[str, Any]]
) -> Identity:
    """Embeddings that tell people apart across pose, light and clothes.

    A batch holds `schedule.batch` / 2 identities, each in both of its scenes; a frame is to be more like the other
    frame of its person than like anybody else's (normalised temperature-scaled cross entropy, as in SimCLR, with
    another scene of the same person in place of an augmented copy). Beside it the network guesses the person's true
    parameters, which teaches it what to look at. `start`: whose trunk to begin with, since it knows the pose already.
    """
    torch.manual_seed(seed)
    people = np.unique(pool.frames.identity)
    vectors = torch.from_numpy(np.stack([person_vector(int(identity)) for identity in people]))
    vectors = (vectors - vectors.mean(0)) / vectors.std(0).clamp_min(1e-3)
    signs = torch.from_numpy(person_signs())
    network = Identity(vectors.shape[1])
    if start is not None:
        network.trunk.load_state_dict(start.trunk.state_dict())
    where = [[np.flatnonzero((pool.frames.identity == identity) & (pool.frames.scene == scene)) for scene in (0, 1)]
             for identity in people]  # fmt: skip
    rng, generator = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    places, half = _endless(len(people), rng), schedule.batch // 2

    def losses() -> dict[str, Tensor]:
        chosen = [next(places) for _ in range(half)]
        numbers = np.array([rng.choice(where[place][scene]) for scene in (0, 1) for place in chosen])
        # Both frames of a person are mirrored or neither: a mirrored person is somebody else.
        mirrored = torch.rand(half, generator=generator) < 0.5
        views = move(pool.batch(numbers, rng), mirrored.repeat(2), generator)
        embedding, guess = network.guess(normalised(views.images))
        target = vectors[chosen] * torch.where(mirrored[:, None], signs, torch.ones_like(signs))
        return {"contrast": _contrast(embedding, half), "person": F.mse_loss(guess, target.repeat(2, 1))}

    _descend(network, losses, schedule, "identity", log)
    return network


def normalised(images: Tensor) -> Tensor:
    """Images [B, 3, S, S] in [0, 1] → what the networks take."""
    return ((images - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)


def _contrast(embedding: Tensor, half: int) -> Tensor:
    """Cross entropy of finding the other view of the same person among all other views; view i + half is i's."""
    alike = embedding @ embedding.T / TEMPERATURE
    alike = alike.masked_fill(torch.eye(2 * half, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(alike, torch.arange(2 * half).roll(half))


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    """0..count-1 in random order, again and again."""
    while True:
        yield from rng.permutation(count).tolist()


def _descend(
    network: torch.nn.Module,
    losses: Callable[[], dict[str, Tensor]],
    schedule: Schedule,
    name: str,
    log: list[dict[str, Any]],
    every: int = 100,
) -> None:
    """Minimise the sum of the losses; the network ends in evaluation mode, as it will be exported."""
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(
        [it for it in network.parameters() if it.requires_grad], schedule.rate, weight_decay=schedule.decay
    )

    def rate(step: int) -> float:
        rise = min(1.0, (step + 1) / schedule.warmup)
        return rise * 0.5 * (1 + float(np.cos(np.pi * step / schedule.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    sums: dict[str, float] = {}
    began = time.process_time()
    for step in tqdm(range(1, schedule.steps + 1), desc=name, unit="step", disable=None):
        terms = losses()
        optimiser.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        scheduler.step()
        for key, value in terms.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        if step % every == 0 or step == schedule.steps:
            count = (step - 1) % every + 1
            row = {key: round(value / count, 5) for key, value in sums.items()}
            log.append({"network": name, "step": step, **row, "cpu_s": round(time.process_time() - began, 1)})
            tqdm.write(" ".join(f"{key} {value}" for key, value in log[-1].items()))
            sums = {}
    network.eval()
