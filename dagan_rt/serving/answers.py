"""What a server must answer: sources and driving frames that measurements send, and the images that belong to them.

A session starts with the first of a ring of frames and goes around it. So every image depends on its source and its
place in the ring alone, and is known beforehand, or from the first time it was answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dagan_rt.bundle import Bundle
from dagan_rt.reenactor import Reenactor

RING = 8  # frames
LEAST_PSNR = 30.0  # dB, of images that were encoded with losses

Transport = Callable[[np.ndarray], np.ndarray]  # an image as it is after its way to the other side


class Answers:
    """The images that belong to each source, and whether an answer is one of them."""

    def __init__(
        self, sources: Sequence[np.ndarray], ring: Sequence[np.ndarray], images: np.ndarray | None = None,
        levels: int = 0, lossy: bool = False,
    ) -> None:  # fmt: skip
        """sources, ring: uint8 [S, S, 3] each. images: uint8 [sources, ring, S, S, 3], or None, not known yet: then the
        first answers are, and must be nobody else's.

        levels: how far a value may be off. lossy: images were encoded with losses, and are held to `LEAST_PSNR`.
        """
        self.sources, self.ring = list(sources), list(ring)
        self._levels, self._lossy = levels, lossy
        self._known: dict[tuple[int, int], np.ndarray] = {}
        self._owners: dict[bytes, int] = {}
        for source, row in enumerate(() if images is None else images):
            self._known |= {(source, at): image for at, image in enumerate(row)}

    @classmethod
    def in_process(
        cls, bundle: Bundle, sources: Sequence[np.ndarray], ring: Sequence[np.ndarray], backend: str,
        threads: int | None, levels: int = 0, transport: Transport | None = None,
    ) -> Answers:  # fmt: skip
        """From a `Reenactor` of this process; `transport` is what an encoding does to frames and images."""
        sent = transport or (lambda image: image)
        with Reenactor(bundle, backend, threads=threads) as reenactor:
            images = []
            for source in sources:
                reenactor.set_source(source)
                images.append([sent(reenactor.drive(sent(frame))) for frame in ring])
        return cls(sources, ring, np.array(images), levels, lossy=transport is not None)

    def frame(self, at: int) -> np.ndarray:
        """The `at`-th frame of a session."""
        return self.ring[at % len(self.ring)]

    def wrong(self, source: int, at: int, image: np.ndarray) -> str:
        """What is wrong with the image that answered frame `at` of a session with that source; "" if nothing is."""
        place = at % len(self.ring)
        expected = self._known.get((source, place))
        if expected is None:
            return self._learn(source, place, image)
        if image.shape != expected.shape or image.dtype != expected.dtype:
            return f"it is {image.dtype} {image.shape}, {expected.dtype} {expected.shape} was expected"
        if np.array_equal(image, expected):
            return ""
        difference = np.abs(image.astype(np.float64) - expected)
        psnr = 20 * np.log10(255 / np.sqrt((difference**2).mean()))
        if (psnr >= LEAST_PSNR) if self._lossy else (difference.max() <= self._levels):
            return ""
        return f"it is off by up to {difference.max():.0f} levels ({psnr:.1f} dB){self._like(source, place, image)}"

    def _learn(self, source: int, place: int, image: np.ndarray) -> str:
        owner = self._owners.setdefault(image.tobytes(), source)
        if owner != source:
            return f"it is an image of source {owner}"
        self._known[source, place] = image.copy()
        return ""

    def _like(self, source: int, place: int, image: np.ndarray) -> str:
        for (other, at), known in self._known.copy().items():
            if (other, at) != (source, place) and np.array_equal(image, known):
                return f": it is the image of source {other}, frame {at}"
        return ""


def drawn_sources(count: int, size: int) -> list[np.ndarray]:
    """Portraits of `count` different drawn heads, uint8 [size, size, 3]."""
    from dagan_rt.training.heads import HELD_OUT, draw_clip

    return [draw_clip(HELD_OUT.start + 1 + number, 1, size).frames[0] for number in range(count)]


def drawn_ring(size: int, frames: int = RING) -> list[np.ndarray]:
    """Every fourth frame of another head that talks, uint8 [size, size, 3]."""
    from dagan_rt.training.heads import HELD_OUT, draw_clip

    return list(draw_clip(HELD_OUT.start, 4 * frames, size).frames[::4])
