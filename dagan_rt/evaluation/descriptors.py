"""What is measured in a face: landmarks, identity, head pose and action units, by ONNX files that the user provides.

One TOML file describes one ONNX file beside it:

    kind = "landmarks"                  # or "identity", "pose", "actions"
    name = "heads landmarks 1"          # printed beside a number
    model = "landmarks.onnx"            # in the same folder
    size = [128, 128]                   # height and width of its input; frames are resized to it (`resized`)
    channels = "RGB"                    # or "BGR"
    layout = "NCHW"                     # or "NHWC"
    scale = 0.00392156862745098         # input = (pixel * scale - mean) / std, float32; mean and std are of red,
    mean = [0.0, 0.0, 0.0]              # green and blue, whatever the order of the channels
    std = [1.0, 1.0, 1.0]
    output = "landmarks"                # the output's name
    score = "confidence"                # optional: an output [B] or [B, 1]; below least_score there is no face
    least_score = 0.5
    noise_from = "2,000 held-out heads" # optional: how `noise` was measured
    [noise]                             # optional: what a metric reads because of this extractor's own error
    akd = 1.2

and, by kind:

    landmarks   output [B, L, 2], (x, y). units = "pixels" (of the input, the first one's centre is 0), "unit" (0 and 1
                at the picture's edges) or "centred" (-1 and 1 at the centres of the first and last pixel).
                indices = [0, 1]: only these of the L points
    identity    output [B, E], an embedding; its length does not matter
    pose        output [B, 3]. order = ["yaw", "pitch", "roll"], units = "degrees" or "radians"
    actions     output [B, A], active from threshold = 0.5 on; names = ["..."], one each (optional)

An image fails where the score is too low or the output is not finite. See train/extractors/ for those of the synthetic
heads, which are meant for nothing else, and train/extractors/README.md for what fits real faces.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.tables import fill, parse, printable, read_text, refuse_unknown

KINDS = ("landmarks", "identity", "pose", "actions")
ANGLES = ("yaw", "pitch", "roll")
FIELDS_OF = {
    "landmarks": ("units", "indices"),
    "identity": (),
    "pose": ("units", "order"),
    "actions": ("threshold", "names"),
}
UNITS = {"landmarks": ("pixels", "unit", "centred"), "pose": ("degrees", "radians")}
METRICS_OF = {"landmarks": ("akd",), "identity": ("aed", "csim"), "pose": ("prmse",), "actions": ("aucon",)}
LARGEST_SIDE = 1024  # of the input, pixels


@dataclass(frozen=True)
class Descriptor:
    """A descriptor file, see the module; what is checked when it is made holds afterwards."""

    kind: str
    name: str
    model: str
    size: tuple[int, int]
    output: str
    channels: str = "RGB"
    layout: str = "NCHW"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    score: str = ""
    least_score: float = 0.5
    units: str = ""
    indices: tuple[int, ...] = ()
    order: tuple[str, ...] = ANGLES
    threshold: float = 0.5
    names: tuple[str, ...] = ()
    noise: dict[str, float] = field(default_factory=dict)
    noise_from: str = ""

    def check(self, file: str) -> None:
        """InputError naming the file and key that cannot be used."""
        self._one_of(file, "kind", KINDS)
        self._one_of(file, "channels", ("RGB", "BGR"))
        self._one_of(file, "layout", ("NCHW", "NHWC"))
        if self.kind in UNITS:
            self._one_of(file, "units", UNITS[self.kind])
        if self.kind == "pose" and sorted(self.order) != sorted(ANGLES):
            raise InputError(f"{file}: order must hold yaw, pitch and roll, got {list(self.order)}")
        if not self.name.strip() or len(self.name) > 200 or printable(self.name) != self.name:
            raise InputError(f"{file}: name must be 1 to 200 printable characters, got {self.name[:80]!r}")
        if not plain_file_name(self.model) or not self.model.endswith(".onnx"):
            raise InputError(
                f"{file}: model must be the name of an .onnx file in the same folder, got {self.model[:80]!r}"
            )
        if not all(8 <= side <= LARGEST_SIDE for side in self.size):
            raise InputError(f"{file}: size must be two numbers from 8 to {LARGEST_SIDE}, got {list(self.size)}")
        if not self.scale or not all(self.std):
            raise InputError(f"{file}: scale and std must not be 0")
        if unknown := sorted(self.noise.keys() - set(METRICS_OF[self.kind])):
            known = ", ".join(METRICS_OF[self.kind])
            raise InputError(f"{file}: noise.{printable(unknown[0][:80])} is not a metric of {self.kind}: {known}")

    def _one_of(self, file: str, key: str, known: tuple[str, ...]) -> None:
        value = getattr(self, key)
        if value not in known:
            raise InputError(f"{file}: {key} must be one of {', '.join(known)}, got {value[:80]!r}")


def read_descriptor(path: str | Path) -> Descriptor:
    """Read and check a descriptor, which may come from anywhere; InputError names the file and key."""
    file = str(path)
    values = parse(read_text(path, "extractor"), file)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{file}: kind must be one of {', '.join(KINDS)}, got {str(kind)[:80]!r}")
    others = {key for other in KINDS for key in FIELDS_OF[other]} - set(FIELDS_OF[kind])
    known = tuple(key for key in Descriptor.__dataclass_fields__ if key not in others)
    refuse_unknown(values, known, file, "")
    # The only numbers that may be negative.
    signed = {key: _signed(values.pop(key), file, key) for key in ("mean", "least_score", "threshold") if key in values}
    descriptor: Descriptor = replace(fill(Descriptor, values, file), **signed)
    descriptor.check(file)
    return descriptor


def _signed(value: Any, file: str, key: str) -> Any:
    numbers = value if key == "mean" else [value]
    if not isinstance(numbers, list) or len(numbers) != (3 if key == "mean" else 1):
        raise InputError(f"{file}: mean must be a list of 3 numbers")
    if not all(type(it) in (int, float) and abs(it) < 1e9 for it in numbers):
        raise InputError(f"{file}: {key} must be finite numbers")
    return tuple(map(float, numbers)) if key == "mean" else float(value)


def plain_file_name(name: str) -> bool:
    """Whether this names a file of the folder at hand, on any system."""
    return bool(name) and name not in (".", "..") and not set(name) & set('/\\:\0"<>|?*') and printable(name) == name
