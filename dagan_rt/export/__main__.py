"""python -m dagan_rt.export: a checkpoint to a verified bundle."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dagan_rt.cli import guarded
from dagan_rt.errors import InputError
from dagan_rt.export.plan import BUDGETS, OPSETS, REWRITES, TARGETS, TRITON, Plan, read_plan, read_serving
from dagan_rt.export.tensorrt import PORTABLE


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the arguments)")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; those of the plan are left out of the namespace where they are not given."""
    parser = _Parser(
        prog="python -m dagan_rt.export",
        description="Export a checkpoint to a bundle of ONNX graphs and TensorRT engines, each compared with PyTorch "
        "before it is kept. With the target triton the bundle lies in a model repository for Triton Inference Server, "
        "as the recipe's table [triton] says.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="generator and key points")
    parser.add_argument(
        "--depth", type=Path, metavar="DIR", help="folder with encoder.pth and depth.pth, for variants that use depth"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle or model repository to write")
    parser.add_argument("--force", action="store_true", help="replace the bundle or repository that --out already is")
    parser.add_argument(
        "--verify-with", type=Path, nargs="+", default=[], metavar="IMAGE",
        help="up to four images of faces to compare on: a source, then driving ones (default: a drawn head)",
    )  # fmt: skip
    parser.add_argument(
        "--rebuild", type=Path, metavar="BUNDLE",
        help="build engines afresh from the graphs of a bundle, for the library and GPU of this machine",
    )  # fmt: skip
    plan = parser.add_argument_group("what to export", "A recipe gives all of these; options replace its values.")
    plan.add_argument(
        "--recipe", metavar="FILE", help="TOML file, or the name of one that ships with dagan-rt, as cpu-int8"
    )

    def option(name: str, **settings: Any) -> None:
        plan.add_argument(name, default=argparse.SUPPRESS, **settings)

    option("--precision", metavar="P", help=f"{', '.join(BUDGETS)} (for each graph the fastest within --budget)")
    option("--target", dest="targets", nargs="+", metavar="T", help=", ".join(TARGETS))
    option("--batch", metavar="N", help="faces at a time: N, or MIN:USUAL:MAX (default 1:1:8)")
    option("--budget", type=float, metavar="DB", help="least PSNR of reenacted frames against fp32 PyTorch, in dB")
    option(
        "--calibrate", metavar="CLIPS",
        help="for int8: a folder of clips and pictures of faces, or heads for synthetic ones",
    )  # fmt: skip
    option("--opset", type=int, metavar="N", help=f"ONNX operator set, {OPSETS.start} (default) to {OPSETS.stop - 1}")
    option("--only", nargs="+", metavar="NAME", help="these subnetworks alone, as attention; no animation from them")
    option(
        "--no-torch-weights", dest="torch_weights", action="store_false",
        help="leave the checkpoint out: smaller, and no torch backend",
    )  # fmt: skip
    option(
        "--compute-capability", dest="compute_capabilities", nargs="+", metavar="CC",
        help=f"GPUs that tensorrt-rtx engines are built for, as 8.9 (default: this machine's, or {' '.join(PORTABLE)})",
    )  # fmt: skip
    option(
        "--strip-weights", action="store_true",
        help="leave the weights out of engines: smaller, filled from the graphs when loaded (needs a GPU)",
    )  # fmt: skip
    option(
        "--plugins", metavar="KIND",
        help="put the CUDA kernels of dagan-rt into engines: python (dagan-rt must be there when they run) or aot "
        "(compiled in, for tensorrt 10.9 and Triton, experimental)",
    )  # fmt: skip
    option(
        "--rewrites", metavar="FOR",
        help=f"what the graphs are rewritten for, of {', '.join(REWRITES)} (default cpu; none leaves them as traced)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export and return the exit code, see `guarded`; 2 also for a graph that is not the network."""
    return guarded("python -m dagan_rt.export", lambda: run(build_parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> int:
    """Check what is cheap to check first, then load, export, verify, and say what to run next."""
    given = {name: value for name, value in vars(arguments).items() if name in Plan.__dataclass_fields__}
    if arguments.rebuild is not None:
        return _rebuild(arguments, given)
    plan = read_plan(arguments.recipe, given)
    for name in ("checkpoint", "out"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name} is missing: give --checkpoint FILE and --out DIR (--help lists the arguments)")
    if len(arguments.verify_with) > 4:
        raise InputError(f"--verify-with takes at most 4 images, got {len(arguments.verify_with)}")

    from dagan_rt.export import check, export, steps, triton
    from dagan_rt.staging import check_target

    check_target(arguments.out, force=arguments.force)
    serving = read_serving(arguments.recipe) if plan.repository else None
    if serving is not None:
        triton.check(plan, serving)
    check(plan)

    from dagan_rt import checkpoints

    checkpoint = checkpoints.inspect(arguments.checkpoint, arguments.depth)
    for note in checkpoint.notes:
        print(f"note: {note}")
    model = checkpoint.build()
    del checkpoint
    options: dict[str, Any] = {"force": arguments.force, "images": arguments.verify_with}
    with _progress(steps(model.config, plan)) as report:
        if serving is not None:
            repository, measured = triton.export_repository(
                model, arguments.out, plan, serving, report=report, **options
            )
        else:
            bundle, measured = export(model, arguments.out, plan, report=report, **options)
    print(measured.table())
    if serving is not None:
        print(triton.described(repository))
        return 0
    size, megabytes = bundle.config.size, sum(entry["bytes"] for entry in bundle.manifest["files"].values()) / 1e6
    print(f"wrote {bundle.path}: {bundle.config.variant}, {size} × {size}, {megabytes:.0f} MB")
    files = ["--source", "portrait.png", "--driving", "clip.mp4", "--out", "result.mp4"]
    animate = ["dagan-rt", "animate", "--bundle", str(bundle.path), *files]
    print("next: " + shlex.join(["dagan-rt", "info", str(bundle.path)] if bundle.cannot_reenact else animate))
    return 0


def _rebuild(arguments: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """Build the engines of a bundle again, and say what to run next."""
    for name in ("checkpoint", "depth", "out", "recipe", "force", "verify_with"):
        if getattr(arguments, name):
            option = name.replace("_", "-")
            raise InputError(f"--{option} cannot be used with --rebuild, which takes everything from the bundle")
    if other := [name for name in given if name not in ("targets", "compute_capabilities", "plugins")]:
        option = "no-torch-weights" if other[0] == "torch_weights" else other[0]
        raise InputError(f"--{option} cannot be used with --rebuild: export the checkpoint again")
    from dagan_rt.export.rebuild import rebuild

    if TRITON in given.get("targets", ()):
        raise InputError("--target triton cannot be used with --rebuild: run dagan-rt triton write BUNDLE afterwards")
    targets, capabilities = (tuple(given.get(name, ())) for name in ("targets", "compute_capabilities"))
    with _progress(None) as report:
        bundle, measured = rebuild(arguments.rebuild, targets, capabilities, given.get("plugins", ""), report)
    print(measured.table())
    print(f"wrote {bundle.path}")
    print("next: " + shlex.join(["dagan-rt", "info", str(bundle.path)]))
    return 0


@contextlib.contextmanager
def _progress(steps: int | None) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=steps, unit="step", disable=None) as bar:

        def report(step: str) -> None:
            bar.set_description(step)
            bar.update()

        yield report


if __name__ == "__main__":
    sys.exit(main())
