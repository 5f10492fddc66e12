"""A source once, then frame by frame: the product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt import backends
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.keypoints import KeyPoints
from dagan_rt.transfer import movement_scale

MOTIONS = ("relative", "absolute")


class Reenactor:
    """Animates one portrait with the frames of another face.

        reenactor = Reenactor("bundle/")
        reenactor.set_source(image)
        for frame in frames:
            show(reenactor.drive(frame))

    Everything that depends on the source alone is computed by `set_source` and kept; `drive` does the rest.
    One instance serves one session: it is not safe to call it from several threads at once.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        backend: str | backends.Backend = "auto",
        motion: str = "relative",
        adapt_scale: bool = False,
        *,
        threads: int | None = None,
    ) -> None:
        """Open a bundle and load it into a backend.

        bundle: a folder written by `python -m dagan_rt.export`, or one opened before.
        backend: "auto" (the fastest that runs here), a name out of `dagan_rt.backends.available()`, or what
            `dagan_rt.backends.open_backend` gave for this bundle, which several sessions can share.
        motion: "relative" moves the source as the driving face moved since its first frame, and keeps the source's
            shape; "absolute" puts the source's key points where the driving face has them (paper, Section 3.4).
        adapt_scale: with relative motion, scale the movement by the size of the source face over the driving one.
        threads: CPU threads; None takes all cores.

        Raises InputError if the bundle is damaged or the backend cannot run here, ValueError for a wrong argument.
        """
        if motion not in MOTIONS:
            raise InputError(f"motion must be {' or '.join(MOTIONS)}, got {motion!r}")
        if adapt_scale and motion == "absolute":
            raise InputError("adapt_scale scales relative motion: it cannot be used with motion='absolute'")
        self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if reason := self._bundle.cannot_reenact:
            raise InputError(f"bundle {self._bundle.path} cannot animate: {reason}")
        opened = backends.open_backend(backend, self._bundle, threads) if isinstance(backend, str) else backend
        self._backend = opened
        self._inputs = {name: [tensor.name for tensor in graph.inputs] for name, graph in self._bundle.graphs.items()}
        self._relative = motion == "relative"
        self._adapt_scale = adapt_scale
        self._source: dict[str, Any] | None = None  # the source's arrays, by the names the other graphs take them under
        self._initial: dict[str, Any] | None = None  # initial key points and movement scale, likewise

    @property
    def size(self) -> int:
        """Side in pixels of the square images that `set_source` and `drive` take and give."""
        return self._bundle.config.size

    @property
    def backend_name(self) -> str:
        """The backend in use, which "auto" chose."""
        return self._backend.name

    def set_source(self, image: np.ndarray) -> None:
        """Choose the portrait to animate, and start a new session.

        image: HWC uint8 RGB in [0, 255], [size, size, 3]. Raises ValueError otherwise, and keeps the former source.
        """
        planes = self._backend.from_image(self._checked("image", image))
        found = self._run("source", {"image": planes})
        self._source = found | _named("source", found) | {"source_image": planes}
        self.reset()

    def reset(self) -> None:
        """Forget the initial driving frame: the next one becomes it."""
        self._initial = None

    def drive(self, frame: np.ndarray) -> np.ndarray:
        """Give the source the expression and pose of a driving frame.

        frame: HWC uint8 RGB in [0, 255], [size, size, 3]; with relative motion, the first after `set_source` or
        `reset` is the initial one, to which the source's own pose corresponds.
        Returns HWC uint8 RGB, [size, size, 3]. Raises ValueError for another frame or without a source.
        """
        if self._source is None:
            raise InputError("drive needs a source: call set_source(image) first")
        driving = self._find("frame", frame)
        if self._initial is None:
            self._initial = self._begin(self._source, driving)
        arrays = self._source | self._initial | _named("driving", driving)
        return self._backend.to_image(self._run("generator", arrays | self._run("motion", arrays))["prediction"])

    def keypoints(self, frame: np.ndarray) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; `frame` as in `drive`. The session stays."""
        return self._on_host(self._find("frame", frame))

    def _find(self, name: str, frame: np.ndarray) -> dict[str, Any]:
        """Depth and key points of one face."""
        return self._run("driving", {"image": self._backend.from_image(self._checked(name, frame))})

    def _begin(self, source: dict[str, Any], driving: dict[str, Any]) -> dict[str, Any]:
        """Initial key points and movement scale of a session; absolute motion is relative motion from the source."""
        scale = 1.0
        if self._adapt_scale:
            scale = movement_scale(self._on_host(source), self._on_host(driving))
        initial = _named("initial", driving if self._relative else source)
        return initial | {"scale": self._backend.from_numpy(np.array([[scale]], np.float32))}

    def _run(self, graph: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """Run one graph on those of `arrays` that it takes, bound by name."""
        return self._backend.run(graph, {name: arrays[name] for name in self._inputs[graph]})

    def _on_host(self, found: dict[str, Any]) -> KeyPoints:
        return KeyPoints(*(self._backend.to_numpy(found[name]) for name in ("kp_value", "kp_jacobian")))

    def _checked(self, name: str, image: np.ndarray) -> np.ndarray:
        shape = (self.size, self.size, 3)
        if not isinstance(image, np.ndarray):
            raise InputError(f"{name} must be uint8 [H, W, 3] = {shape}, got {type(image).__name__}")
        if image.dtype != np.uint8 or image.shape != shape:
            raise InputError(f"{name} must be uint8 [H, W, 3] = {shape}, got {image.dtype} {image.shape}")
        return image


def _named(role: str, found: dict[str, Any]) -> dict[str, Any]:
    """The key points of the source, driving or initial face under the names the `motion` graph takes them."""
    return {f"{role}_{name}": found[name] for name in ("kp_value", "kp_jacobian")}
