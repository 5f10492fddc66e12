"""A source once, then frame by frame: the product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt import backends
from dagan_rt.bundle import Bundle
from dagan_rt.errors import InputError
from dagan_rt.frames import Frames, Pending, open_frames
from dagan_rt.keypoints import KeyPoints

MOTIONS = ("relative", "absolute")


class Reenactor:
    """Animates one portrait with the frames of another face.

        reenactor = Reenactor("bundle/")
        reenactor.set_source(image)
        for frame in frames:
            show(reenactor.drive(frame))

    Everything that depends on the source alone is computed by `set_source` and kept; `drive` does the rest.
    One instance serves one session: it is not safe to call it from several threads at once. `Streams` serves many.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        backend: str | backends.Backend = "auto",
        motion: str = "relative",
        adapt_scale: bool = False,
        *,
        motion_scale: float = 1.0,
        by_points: bool = False,
        threads: int | None = None,
    ) -> None:
        """Open a bundle and load it into a backend.

        bundle: a folder written by `python -m dagan_rt.export`, or one opened before; or a server that serves one,
            "grpc://host:8001" or "http://host:8000", which brings its own backend.
        backend: "auto" (the fastest that runs here), a name out of `dagan_rt.backends.available()`, or what
            `dagan_rt.backends.open_backend` gave for this bundle, which several sessions can share.
        motion: "relative" moves the source as the driving face moved since its first frame, and keeps the source's
            shape; "absolute" puts the source's key points where the driving face has them (paper, Section 3.4).
        adapt_scale: with relative motion, scale the movement by the size of the source face over the driving one.
        motion_scale: with relative motion, how far the source moves for what the driving face moves, 0 to 4: below 1
            is calmer, above 1 exaggerates.
        by_points: make ready for `submit_points`, too; `torch-cuda`, `tensorrt` and `tensorrt-rtx` are slower then, and
            servers cannot.
        threads: CPU threads; None takes all cores.

        Raises InputError if the bundle is damaged, the backend cannot run here or the server cannot be used,
        ValueError for a wrong argument.
        """
        check_motion(motion, adapt_scale, motion_scale)
        self._motion, self._adapt_scale, self._motion_scale = motion, adapt_scale, motion_scale
        opening = _open_remote if is_address(bundle) else _open_here
        opened = opening(bundle, backend, threads, by_points)
        self._frames, self._more, self._backend_name, self._reason, self._model = opened
        self._has_source = self._begun = False
        self._last: Pending | None = None

    def another(self) -> Reenactor:
        """A further session of the same bundle on the same backend, with a source of its own; close it as well."""
        twin = copy.copy(self)
        twin._frames, twin._has_source, twin._begun, twin._last = self._more(), False, False, None
        return twin

    @property
    def size(self) -> int:
        """Side in pixels of the square images that `set_source` and `drive` take and give."""
        return self._frames.size

    @property
    def frames(self) -> Frames:
        """What runs the session, in its slot 0."""
        return self._frames

    @property
    def backend_name(self) -> str:
        """The backend in use, which "auto" chose."""
        return self._backend_name

    @property
    def model(self) -> str:
        """What tells the weights from others, `Bundle.weights_digest`; "" where they are unknown (a server's)."""
        return self._model

    @property
    def backend_reason(self) -> str:
        """Why this backend, on one line; with "auto", also why none of the faster ones."""
        return self._reason

    @property
    def motion(self) -> str:
        """ "relative" or "absolute", see `set_motion`."""
        return self._motion

    @property
    def adapt_scale(self) -> bool:
        """Whether relative motion is scaled by the size of the source face over the driving one."""
        return self._adapt_scale

    def set_source(self, image: np.ndarray) -> None:
        """Choose the portrait to animate, and start a new session.

        image: HWC uint8 RGB in [0, 255], [size, size, 3]. Raises ValueError otherwise, and keeps the former source.
        """
        checked = check_image("image", image, self.size)
        self._check_idle("set_source")
        self._frames.set_source(0, checked)
        self._has_source = True
        self.reset()

    def reset(self) -> None:
        """Forget the initial driving frame: the next one becomes it."""
        self._begun = False

    def set_motion(self, motion: str, adapt_scale: bool = False) -> None:
        """Choose how motion is taken over, and start a new session with the same portrait, as `reset` does.

        motion, adapt_scale: as for the constructor. Raises ValueError for a wrong argument and while frames of
        `submit` are under way, and keeps the former motion.
        """
        check_motion(motion, adapt_scale)
        self._check_idle("set_motion")
        self._motion, self._adapt_scale = motion, adapt_scale
        self.reset()

    def drive(self, frame: np.ndarray) -> np.ndarray:
        """Give the source the expression and pose of a driving frame.

        frame: HWC uint8 RGB in [0, 255], [size, size, 3]; with relative motion, the first after `set_source` or
        `reset` is the initial one, to which the source's own pose corresponds.
        Returns HWC uint8 RGB, [size, size, 3]. Raises ValueError for another frame or without a source.
        """
        image: np.ndarray = self.submit(frame).result()[0]
        return image

    def submit(self, frame: np.ndarray) -> Pending:
        """As `drive`, without waiting: the `result()` of what comes back is uint8 [1, size, size, 3].

        Up to `frames.ahead` may be under way; beyond that, this waits for the oldest. A new source or a new initial
        frame has to wait until they are through.
        """
        if not self._has_source:
            raise InputError("drive needs a source: call set_source(image) first")
        checked = check_image("frame", frame, self.size)
        self._begin(checked)
        self._last = self._frames.submit([0], [checked])
        return self._last

    def submit_points(self, points: KeyPoints) -> Pending:
        """As `submit`, by the key points of a driving face as `keypoints` gives them, smoothed or from a `Template`.

        points: NumPy [1, K, 2] and [1, K, 2, 2]; with relative motion the first of a session are the initial ones.
        Raises InputError for others, without a source, and where a backend computes key points and image in one
        because the constructor was not told `by_points`.
        """
        submit = getattr(self._frames, "submit_points", None)
        if submit is None:
            raise InputError(f"backend {self._backend_name} is driven by key points only with by_points=True")
        if not self._has_source:
            raise InputError("submit_points needs a source: call set_source(image) first")
        _check_points(points, self._frames.num_keypoints)  # type: ignore[attr-defined]
        self._begin(points)
        self._last = submit(0, points)
        return self._last

    def keypoints(self, frame: np.ndarray) -> KeyPoints:
        """The key points of any face, NumPy [1, K, 2] and [1, K, 2, 2]; `frame` as in `drive`. The session stays."""
        return self._frames.keypoints(check_image("frame", frame, self.size))

    def close(self) -> None:
        """Free the session's memory on the device; nothing can be driven afterwards."""
        self._has_source = False
        self._frames.close()

    def __enter__(self) -> Reenactor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, first: Any) -> None:
        """Make the first frame, or key points, of a session the initial ones."""
        if not self._begun:
            self._check_idle("a new initial frame")
            relative = self._motion == "relative"
            self._frames.begin(
                0, first if relative else None, self._adapt_scale, self._motion_scale if relative else 1.0
            )
            self._begun = True

    def _check_idle(self, what: str) -> None:
        if self._last is not None and not self._last.done():
            raise InputError(f"{what} must wait for the frames under way: take the results of submit first")


def is_address(bundle: object) -> bool:
    """Whether this names a server rather than a folder."""
    return isinstance(bundle, str) and "://" in bundle


def check_motion(motion: str, adapt_scale: bool, motion_scale: float = 1.0) -> None:
    """Refuse a motion that is not one of `MOTIONS`, a scale out of range, and one that has nothing to scale."""
    if motion not in MOTIONS:
        raise InputError(f"motion must be {' or '.join(MOTIONS)}, got {motion!r}")
    if adapt_scale and motion == "absolute":
        raise InputError("adapt_scale scales relative motion: it cannot be used with motion='absolute'")
    if not 0 <= motion_scale <= 4:
        raise InputError(f"motion_scale must be 0 to 4, got {motion_scale}")
    if motion_scale != 1 and motion == "absolute":
        raise InputError("motion_scale scales relative motion: it cannot be used with motion='absolute'")


def check_image(name: str, image: Any, size: int) -> np.ndarray:
    """The image itself if it is uint8 [size, size, 3]; InputError otherwise."""
    shape = (size, size, 3)
    if not isinstance(image, np.ndarray):
        raise InputError(f"{name} must be uint8 [H, W, 3] = {shape}, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.shape != shape:
        raise InputError(f"{name} must be uint8 [H, W, 3] = {shape}, got {image.dtype} {image.shape}")
    return image


def _check_points(points: KeyPoints, count: int) -> None:
    shapes = [np.shape(part) for part in points]
    if shapes != [(1, count, 2), (1, count, 2, 2)]:
        raise InputError(f"points must be [1, K, 2] and [1, K, 2, 2] with K = {count}, got {shapes[0]} and {shapes[1]}")
    if not all(np.isfinite(part).all() for part in points):
        raise InputError("points must be finite numbers")


def open_loaded(
    bundle: Bundle, backend: str | backends.Backend, threads: int | None = None
) -> tuple[backends.Backend, str]:
    """A backend with a bundle that can animate, and why this one."""
    if reason := bundle.cannot_reenact:
        raise InputError(f"bundle {bundle.path} cannot animate: {reason}")
    if not isinstance(backend, str):
        return backend, "given by the caller"
    opened, choice = backends.open_chosen(backend, bundle, threads)
    return opened, choice.reason


def _open_here(
    bundle: str | Path | Bundle, backend: str | backends.Backend, threads: int | None, by_points: bool
) -> tuple[Frames, Callable[[], Frames], str, str, str]:
    """The frames of a bundle in a backend, what makes more of them, the backend's name, why this one, the weights."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    loaded, reason = open_loaded(opened, backend, threads)
    more = partial(open_frames, loaded, opened, by_points=by_points)
    return more(), more, loaded.name, reason, opened.weights_digest


def _open_remote(
    url: str | Path | Bundle, backend: str | backends.Backend, threads: int | None, by_points: bool
) -> tuple[Frames, Callable[[], Frames], str, str, str]:
    """The same of a server."""
    from dagan_rt.serving.remote import RemoteFrames

    if backend not in ("auto", RemoteFrames.name) or threads is not None:
        raise InputError(f"the server at {url} has a backend and threads of its own: leave out backend and threads")
    if by_points:
        raise InputError(f"the server at {url} takes pictures, not key points: give the bundle itself for those")
    more = partial(RemoteFrames, str(url))
    frames = more()
    return frames, more, frames.name, frames.reason, ""
