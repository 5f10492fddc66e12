"""Videos shared among processes, none of which can take the others down: not by a crash, not by Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError
from dagan_rt.faces import FaceDetector, load_detector
from dagan_rt.preparation.clips import OutputError
from dagan_rt.preparation.options import Options
from dagan_rt.preparation.video import CRASHED, FAILED, Job, prepare_video


def rows_of(
    jobs: Sequence[Job], options: Options, out: Path, workers: int, detector: FaceDetector | None = None
) -> Generator[dict[str, Any], None, None]:
    """The manifest row of each video, in the order in which they are done.

    workers: processes, at most one a video; 0: none, everything happens here, with `detector` if it is given.
    Raises OutputError where clips cannot be written and InputError where the detector cannot be loaded. Close the
    iterator to end the processes at once.
    """
    if workers == 0:
        detector = detector or load_detector(options.detector)
        for job in jobs:
            yield attempt(job, options, detector, out)
        return
    waiting = list(reversed(jobs))
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.job for worker in crew):
            crew = [worker for worker in crew if not worker.gone]
            wanted = min(workers, len(waiting) + sum(worker.job is not None for worker in crew))
            crew += [_Worker(options, out) for _ in range(wanted - len(crew))]
            for worker in crew:
                if worker.ready and not worker.job and waiting:
                    worker.give(waiting.pop())
            for connection in wait([worker.connection for worker in crew]):
                worker = next(worker for worker in crew if worker.connection is connection)
                row = worker.answer()
                if row is not None:
                    yield row
    finally:
        for worker in crew:
            worker.end()


def attempt(job: Job, options: Options, detector: FaceDetector, out: Path) -> dict[str, Any]:
    """`prepare_video`; what nobody thought of is a reason to skip this video, not to lose the others."""
    try:
        return prepare_video(job, options, detector, out)
    except OutputError:
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"file": str(job.path), "skipped": FAILED, "detail": detail}


class _Worker:
    """A process that works on one video at a time."""

    def __init__(self, options: Options, out: Path) -> None:
        context = multiprocessing.get_context("spawn")  # threads, as ONNX Runtime's, do not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, options, out), daemon=True)
        self.job: Job | None = None
        self.ready = self.gone = False
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it has just died; its end is the answer
            self.connection.send(job)

    def answer(self) -> dict[str, Any] | None:
        """What the process has sent: a row, or None when it has no job yet or any more; raises what it raised."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            return self._crashed()
        if kind == "ready":
            self.ready = True
            return None
        if kind == "error":
            raise content
        self.job = None
        return dict(content)

    def _crashed(self) -> dict[str, Any] | None:
        self.process.join(timeout=5)
        self.end()
        self.gone, job = True, self.job
        if job is None:
            if self.ready:  # it had nothing to do
                return None
            raise InputError(f"a worker process could not start (exit code {self.process.exitcode})")
        self.job = None
        return {"file": str(job.path), "skipped": CRASHED, "detail": f"exit code {self.process.exitcode}"}

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _work(connection: Connection, options: Options, out: Path) -> None:
    """The process: a detector of its own, then one job after the other until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("dagan_rt").setLevel(logging.ERROR)  # what is damaged stands in the manifest
    with contextlib.suppress(EOFError, OSError):
        try:
            detector = load_detector(options.detector)
        except InputError as error:
            connection.send(("error", error))
            return
        connection.send(("ready", None))
        while True:
            job = connection.recv()
            try:
                connection.send(("row", attempt(job, options, detector, out)))
            except OutputError as error:
                connection.send(("error", error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
