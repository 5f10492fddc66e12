"""What client, model and exporter agree on: names of tensors and request parameters, settings, the sizes of things.

A sequence is one session. Its requests, over gRPC or HTTP:

| request | inputs                                                  | outputs                                    |
|---------|---------------------------------------------------------|--------------------------------------------|
| START   | `source` or `source_encoded`; a frame too, or none      | those of the frame; none without one       |
| step    | `frame` or `frame_encoded`                              | `image`, `image_encoded`, `kp_*`, as asked |
| END     | a frame, or `end` where there is none                   | those of the frame; none without one       |

`source`, `frame` and `image` are uint8 HWC RGB, [size, size, 3]; encoded ones are JPEG, PNG or WebP of any size, which
are cropped to their centred square and resampled. The first frame of a sequence is its initial one. Request parameters:

| parameter      | with     | value                                                                                   |
|----------------|----------|-----------------------------------------------------------------------------------------|
| `motion`       | START    | "relative" (default) or "absolute"                                                      |
| `adapt_scale`  | START    | true or false (default)                                                                 |
| `motion_scale` | START    | 0 to 4 (default 1): how far the source moves for what the driving face moves            |
| `restart`      | START    | true: replace the sequence of that id if there is one; false (default): refuse          |
| `encoding`     | any      | "JPEG", "PNG" or "WEBP": of `image_encoded`; it is made where this is given             |
| `quality`      | any      | 1 to 95 (default 95), for JPEG and WebP                                                 |

The two scales are for relative motion alone. A server refuses a parameter that it does not know: a client that may meet
older servers leaves out those that have their default.

`image_encoded` without `encoding` is a PNG if `image` was not asked for, and left out otherwise. Where only `kp_value`
and `kp_jacobian` are asked for, the frame's key points are found and nothing moves; beside an image they are left out.

Requests of a sequence are handled in the order in which they came, and its frames are answered in it. A restart, and an
END without a frame, are answered after all frames before them. END ends the sequence even where its request is refused.
A START that is refused, or whose frame is, opens nothing; a refused restart leaves what it would have replaced as it
was, unless that was gone already (the source or its first frame could be read, but not animated).

Refusals, by status: UNAVAILABLE: the sequence's queue is full, all sequences are taken or the server stops; come back.
NOT_FOUND: the sequence is not open, as after its idle time; START again with the source. Triton itself answers a step
of a sequence that it does not know with INVALID_ARGUMENT and "must specify the START flag". ALREADY_EXISTS: a second
START without `restart`. CANCELLED: nobody waits for the answer. INTERNAL: it is the server's fault, and the message
says what happened. INVALID_ARGUMENT: everything else that is wrong with a request.

Of several instances of the model, each has its own sequences: Triton keeps a sequence from START to END on one of them,
and "all sequences are taken" speaks of that one. Triton's own candidates (`max_candidate_sequences`) hold every id that
sent a START, refused ones too, until its END or its idle time: who comes back after UNAVAILABLE should keep its id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dagan_rt.errors import InputError

MODEL = "reenact"  # one response a request, over any protocol
STREAM_MODEL = "reenact_stream"  # decoupled: a request holds many frames, [N, size, size, 3], and gets N responses
OPEN_MODEL, KEYPOINTS_MODEL, DRIVE_MODEL = "dagan_open", "dagan_keypoints", "dagan_drive"  # of the layout "graphs"
FRAME, FRAME_ENCODED, SOURCE, SOURCE_ENCODED, END = "frame", "frame_encoded", "source", "source_encoded", "end"
IMAGE, IMAGE_ENCODED, POINTS = "image", "image_encoded", ("kp_value", "kp_jacobian")
OPTIONS = ("motion", "adapt_scale", "motion_scale", "restart", "encoding", "quality")
UNKNOWN_OPTION = "parameter must be one of"  # what a server says of one that is younger than itself
NEEDS_START = "must specify the START flag"  # what Triton says of a step whose sequence it does not know
MOST_ENCODED = 32 << 20  # bytes
Parameter = str | bool | int | float  # of a request


@dataclass(frozen=True)
class Settings:
    """How a model serves; the `parameters` of its config.pbtxt, each as a string."""

    backend: str = "auto"
    threads: int = 0  # CPU threads of the backend; 0: its own choice
    sequences: int = 64  # that may be open at once, an instance
    queue: int = 8  # frames of one sequence that may be under way, from request to answer; beyond, it is refused
    batch: int = 32  # frames driven at once, at most
    deadline: float = 0.002  # seconds that a frame waits for others to share its batch
    idle: float = 60.0  # seconds without a request after which a sequence is freed
    most_pixels: int = 16_000_000  # of an encoded image

    def __post_init__(self) -> None:
        for name, least, most in (
            ("threads", 0, 1024), ("sequences", 1, 4096), ("queue", 1, 1024), ("batch", 1, 1024), ("deadline", 0, 1),
            ("idle", 0.1, 86400), ("most_pixels", 256, 100_000_000),
        ):  # fmt: skip
            if not least <= (value := getattr(self, name)) <= most:
                raise InputError(f"{name} must be {least} to {most}, got {value}")

    def to_parameters(self) -> dict[str, str]:
        """For config.pbtxt."""
        return {entry.name: str(getattr(self, entry.name)) for entry in fields(self)}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> Settings:
        """The inverse; other parameters are left alone. Raises InputError for a value of the wrong kind."""
        kinds: dict[str, type] = {entry.name: type(entry.default) for entry in fields(cls)}
        values: dict[str, Any] = {}
        for name, kind in kinds.items():
            if name in parameters:
                try:
                    values[name] = kind(parameters[name])
                except ValueError:
                    given = parameters[name][:80]
                    raise InputError(f"parameter {name} must be {kind.__name__}, got {given!r}") from None
        return cls(**values)


@dataclass(frozen=True)
class Options:
    """The request parameters."""

    motion: str = "relative"
    adapt_scale: bool = False
    motion_scale: float = 1.0
    restart: bool = False
    encoding: str = ""
    quality: int = 95

    @classmethod
    def read(cls, parameters: Mapping[str, Any]) -> Options:
        """Check a request's parameters; InputError names the first that is wrong. Unknown ones are an error, too."""
        from dagan_rt.images import ENCODINGS  # which needs Pillow; who only writes or reads settings does not

        hints = {entry.name: type(entry.default) for entry in fields(cls)}
        for name, value in parameters.items():
            if name not in hints:
                raise InputError(f"{UNKNOWN_OPTION} {', '.join(OPTIONS)}, got {str(name)[:80]!r}")
            if type(value) is not hints[name] and (type(value), hints[name]) != (int, float):
                raise InputError(f"parameter {name} must be {hints[name].__name__}, got {str(value)[:80]!r}")
        options = cls(**parameters)
        if options.encoding not in ("", *ENCODINGS):
            raise InputError(f"encoding must be one of {', '.join(ENCODINGS)}, got {options.encoding[:80]!r}")
        if not 1 <= options.quality <= 95:
            raise InputError(f"quality must be 1 to 95, got {options.quality}")
        return options
