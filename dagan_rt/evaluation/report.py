"""An evaluation on paper: the table, and the folder with its numbers, rows, pairs and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.evaluation.compare import heading, number, table_line
from dagan_rt.evaluation.pairs import write_pairs
from dagan_rt.evaluation.scores import BY_MODE, METRICS, Evaluation
from dagan_rt.evaluation.sets import ImageSet
from dagan_rt.files import open_input
from dagan_rt.tables import printable
from dagan_rt.training.data import BadClip, Clips

FILE, FORMAT = "evaluation.json", 1
LARGEST_FILE = 256 << 20  # bytes of an evaluation.json: a row of two sets takes about 300
SHOWN = ("best", "median", "worst")


@dataclass(frozen=True)
class Evaluated:
    """One mode of a report: what was found, what doing nothing scores on the same sets, and the sets."""

    evaluation: Evaluation
    baseline: Evaluation | None
    sets: Sequence[ImageSet]


def table(it: Evaluated) -> str:
    """Markdown: a line a metric with its interval, what doing nothing scores, the noise floor, counts and extractor."""
    found, baseline = it.evaluation, it.baseline
    kind = "self-reenactment" if found.mode == "self" else "cross-identity reenactment"
    clips = {row[key] for row in found.rows for key in ("source_clip", "driving_clip")}
    titles = ["metric", "score [95 %]", "source repeated", "noise floor", "sets", "failed", "measured by"]
    lines = [
        f"{kind}: {len(found.rows)} image sets of {len(clips)} clips",
        "",
        table_line(titles),
        table_line(["---"] * 7),
    ]
    for name in BY_MODE[found.mode]:
        if name not in found.scores:
            lines.append(table_line([heading(name), "absent", "", "", "", "", found.absent.get(name, "")]))
            continue
        score = found.scores[name]
        repeated = number(name, baseline.scores[name]) if baseline is not None else ""
        noise = "" if score.noise is None else f"{score.noise:.4g}"
        counts = [str(score.count), str(score.failed), score.extractor or "pixels"]
        lines.append(table_line([heading(name), number(name, score), repeated, noise, *counts]))
    lines += ["", *remarks(found)]
    return "\n".join(lines).rstrip()


def remarks(found: Evaluation) -> list[str]:
    """What a reader of the numbers has to know, a sentence each."""
    lines = list(found.notes)
    if found.unreadable:
        lost = sum(entry["sets"] for entry in found.unreadable.values())
        lines.append(f"{lost} image sets are left out: {len(found.unreadable)} clips cannot be read")
        lines += [f"  {name}: {entry['sets']} sets: {entry['reason']}" for name, entry in found.unreadable.items()][:8]
    return [printable(line) for line in lines]


def check_folder(out: Path) -> None:
    """InputError unless results may be written to `out`: a new folder, an empty one, or one with earlier results."""
    if out.name in ("", "..") or "\0" in str(out):
        raise InputError(f"--out {out} must be the name of a folder")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist, make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: the folder {out.parent} is read-only")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out} must be a folder, and it is something else")
    if out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file():
        raise InputError(f"--out {out} holds something other than an evaluation: name a new folder")


def write_folder(
    out: Path, evaluated: Sequence[Evaluated], clips: Clips, provenance: dict[str, Any],
    reenact: Mapping[str, Callable[..., np.ndarray]],
) -> None:  # fmt: skip
    """Write evaluation.json, rows.csv, pairs-MODE.csv and sheet.png; all are complete before any takes its place.

    reenact: by mode, what was evaluated, for the pictures.
    """
    check_folder(out)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        (partial / FILE).write_text(json.dumps(to_dict(evaluated, provenance), indent=1) + "\n", encoding="utf-8")
        (partial / "rows.csv").write_text(rows_csv(evaluated), encoding="utf-8", newline="")
        for it in evaluated:
            write_pairs(partial / f"pairs-{it.evaluation.mode}.csv", clips, it.sets)
        _write_sheet(partial / "sheet.png", evaluated, clips, reenact)
        out.mkdir(exist_ok=True)
        written = sorted(partial.iterdir(), key=lambda file: file.name == FILE)  # what names the others, last
        for file in written:
            os.replace(file, out / file.name)
        for stale in {*(f"pairs-{mode}.csv" for mode in BY_MODE), "sheet.png"} - {file.name for file in written}:
            (out / stale).unlink(missing_ok=True)  # of an earlier evaluation
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_dict(evaluated: Sequence[Evaluated], provenance: dict[str, Any]) -> dict[str, Any]:
    """For evaluation.json."""
    return {
        "format": FORMAT,
        "provenance": provenance,
        "evaluations": [it.evaluation.to_dict() for it in evaluated],
        "source repeated": [it.baseline.to_dict() | {"rows": []} for it in evaluated if it.baseline is not None],
    }


def read_evaluations(path: str | Path) -> list[Evaluation]:
    """The evaluations of an evaluation.json, which may come from anywhere; InputError where it is none."""
    with open_input(path, "evaluation") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise InputError(f"{path} must be at most {LARGEST_FILE:,} bytes")
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            raise InputError(f"{path} has format {str(values['format'])[:20]}, this program reads {FORMAT}")
        entries = list(values["evaluations"])
    except InputError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError):
        raise InputError(f"{path} is not an evaluation that dagan-rt evaluate wrote") from None
    return [Evaluation.from_dict(entry, str(path)) for entry in entries]


def rows_csv(evaluated: Sequence[Evaluated]) -> str:
    """A line an image set, empty where a metric failed or is of the other mode."""
    text = io.StringIO(newline="")
    places = ["source_clip", "source_identity", "source_frame", "driving_clip", "driving_identity", "driving_frame",
              "initial_frame"]  # fmt: skip
    writer = csv.DictWriter(text, ["mode", *places, *METRICS], lineterminator="\n")
    writer.writeheader()
    for it in evaluated:
        writer.writerows({"mode": it.evaluation.mode} | row for row in it.evaluation.rows)
    return text.getvalue()


def ranked(found: Evaluation) -> list[tuple[str, dict[str, Any]]]:
    """The best, median and worst row by L1, or by CSIM, with a label each; the first ones where neither is known."""
    metric = next((name for name in ("l1", "csim", "prmse", "aucon") if name in found.scores), None)
    rows = [row for row in found.rows if metric is not None and row[metric] is not None]
    if not rows or metric is None:
        return [(f"{found.mode} {place + 1}", row) for place, row in enumerate(found.rows[:3])]
    rows.sort(key=lambda row: row[metric] if METRICS[metric].lower_is_better else -row[metric])
    chosen = dict(zip(SHOWN, (rows[0], rows[len(rows) // 2], rows[-1]), strict=True))
    return [(f"{found.mode}, {label}: {METRICS[metric].title} {row[metric]:.3g}", row) for label, row in chosen.items()]


def _write_sheet(
    path: Path, evaluated: Sequence[Evaluated], clips: Clips, reenact: Mapping[str, Callable[..., np.ndarray]]
) -> None:  # fmt: skip
    """source | driving | generated | difference of generated and driving (which is the truth in self-reenactment)."""
    from dagan_rt.training.sheets import contact_sheet, difference_image, write_sheet

    lines, labels = [], []
    numbers = {clips.name(number): number for number in range(len(clips))}
    for it in evaluated:
        for label, row in ranked(it.evaluation):
            driving_frames = [row["driving_frame"], row["initial_frame"]]
            try:
                source = clips.read(numbers[row["source_clip"]], [row["source_frame"]])[0].image
                driving, initial = (frame.image for frame in clips.read(numbers[row["driving_clip"]], driving_frames))
            except BadClip:  # it was readable before
                continue
            generated = reenact[it.evaluation.mode](source[None], driving[None], initial[None])[0]
            line = [source, driving, generated]
            lines.append(line + [difference_image(generated, driving)] if it.evaluation.mode == "self" else line)
            labels.append(label)
    if lines:
        write_sheet(path, contact_sheet(lines, labels, ["source", "driving", "generated", "difference x 3"]))
