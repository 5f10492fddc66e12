"""Sequences of requests as streams: what the served model does, without a word of Triton.

Every request is taken at once and answered later, exactly once: nothing may wait where there is no bound. A sequence
has a mailbox, whose requests are handled in order, one at a time; frames go on to its stream, which batches them with
those of the others. Threads: whoever calls `accept`; a pool, which decodes and computes sources; one that answers; one
that frees what is idle.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dagan_rt.errors import InputError
from dagan_rt.images import ENCODINGS, center_square, decode_image, encode_image
from dagan_rt.serving import protocol
from dagan_rt.serving.protocol import Options, Settings
from dagan_rt.streams import QueueFull, Result, Stream, Streams

ENCODED = (protocol.SOURCE_ENCODED, protocol.FRAME_ENCODED)
HANDLERS = 4  # threads that decode and compute sources; few, since the model needs the cores
log = logging.getLogger("dagan_rt")


class Refused(Exception):
    """A request that cannot be served, with the name of its status."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(Protocol):
    """One request, as the server hands it over."""

    sequence: int | str  # 0: no sequence, to warm up
    start: bool
    end: bool
    parameters: Mapping[str, Any]
    wanted: Collection[str]  # names of outputs
    many: bool  # whether it may hold several frames, each of which gets an answer

    def input(self, name: str) -> np.ndarray | None:
        """An input by name, the caller's own copy; None if it was not sent."""

    def answer(self, outputs: Mapping[str, np.ndarray], last: bool = True) -> None:
        """Send outputs."""

    def refuse(self, status: str, message: str) -> None:
        """Send an error; the last thing said."""


@dataclass(eq=False)
class _Sequence:
    """One session, from its START until its last answer."""

    id: int | str
    stream: Stream | None = None
    mail: deque[Request] = field(default_factory=deque)
    busy: bool = False  # whether a thread handles its mail
    pending: int = 0  # frames in its stream
    ended: bool = False  # END came, or it was freed
    settled: bool = False  # all of it is answered
    used: float = 0.0  # when a request came or was answered last, by time.monotonic()


class Sequences:
    """All sequences of one model instance."""

    def __init__(self, streams: Streams, settings: Settings) -> None:
        """streams: for at least `settings.sequences` streams; closed with this."""
        self._streams, self._settings = streams, settings
        self._lock = threading.Lock()
        self._open: dict[int | str, _Sequence] = {}
        self._live = 0  # sequences that hold a stream or wait for one: those open, and those that end
        self._closed = threading.Event()
        self._answers: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.refused = 0  # requests
        self._pool = ThreadPoolExecutor(HANDLERS, "dagan-rt sequences")
        self._threads = [
            threading.Thread(target=work, name=f"dagan-rt {work.__name__[1:]}", daemon=True)
            for work in (self._answer_all, self._free_idle)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def open(self) -> int:
        """How many sequences are open."""
        with self._lock:
            return len(self._open)

    def accept(self, request: Request) -> None:
        """Take a request; its answer comes from another thread."""
        try:
            if request.sequence == 0:
                self._pool.submit(self._guarded, request, self._warm_up)
                return
            options = _options(request)
            with self._lock:
                sequence = self._start(request, options) if request.start else self._find(request)
                if len(sequence.mail) >= self._settings.queue:
                    raise Refused("UNAVAILABLE", f"{_name(sequence)} has {len(sequence.mail)} requests waiting already")
                sequence.mail.append(request)
                sequence.used = time.monotonic()
                if request.end:
                    sequence.ended = True
                    self._forget(sequence)
                if sequence.busy:
                    return
                sequence.busy = True
            if request.start or any(request.input(name) is not None for name in ENCODED):
                self._pool.submit(self._handle_mail, sequence)
            else:
                self._handle_mail(sequence)  # only a copy: not worth another thread
        except Refused as refusal:
            self._refuse(request, refusal)

    def close(self) -> None:
        """Refuse what is under way, and free everything."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._streams.close()
        self._answers.put(None)
        for thread in self._threads:
            thread.join()

    # ------------------------------------------------------------------------------------------------------------------
    # one request after the other

    def _handle_mail(self, sequence: _Sequence) -> None:
        while True:
            with self._lock:
                if not sequence.mail:
                    sequence.busy = False
                    self._settle(sequence)
                    return
                request = sequence.mail.popleft()
            self._guarded(request, lambda request: self._handle(sequence, request))

    def _guarded(self, request: Request, work: Callable[[Request], None]) -> None:
        """Whatever goes wrong is this request's answer."""
        try:
            work(request)
        except Refused as refusal:
            self._refuse(request, refusal)
        except QueueFull as error:
            self._refuse(request, Refused("UNAVAILABLE", str(error)))
        except InputError as error:
            self._refuse(request, Refused("INVALID_ARGUMENT", str(error)))
        except Exception as error:
            log.exception("a request of sequence %s failed", request.sequence)
            self._refuse(request, Refused("INTERNAL", f"{type(error).__name__}: {error}"))

    def _handle(self, sequence: _Sequence, request: Request) -> None:
        options = _options(request)
        if request.start:
            try:
                sources = self._pictures(request, protocol.SOURCE, protocol.SOURCE_ENCODED)
                if len(sources) != 1:
                    raise InputError(f"START must carry one source (source or source_encoded), got {len(sources)}")
                sequence.stream = self._streams.open(sources[0], options.motion, options.adapt_scale)
            except BaseException:
                with self._lock:
                    sequence.ended = True
                    self._forget(sequence)
                raise
        elif request.input(protocol.SOURCE) is not None or request.input(protocol.SOURCE_ENCODED) is not None:
            raise InputError("a source goes with START alone: send START with the parameter restart to change it")
        stream = sequence.stream
        if stream is None:
            raise Refused("NOT_FOUND", f"{_name(sequence)} is not open: its START failed; send START again")
        frames = self._frames(request)
        if not frames:
            if not (request.start or request.end):
                raise InputError("a step must carry a frame: send frame or frame_encoded")
            self._answers.put(lambda: request.answer({}))
        elif set(request.wanted) and set(request.wanted) <= set(protocol.POINTS):
            found = self._streams.keypoints(frames[0])
            outputs = dict(zip(protocol.POINTS, (found.value, found.jacobian), strict=True))
            self._answers.put(lambda: request.answer({name: outputs[name] for name in request.wanted}))
        else:
            self._push(sequence, stream, request, frames, options)

    def _push(
        self, sequence: _Sequence, stream: Stream, request: Request, frames: Sequence[np.ndarray], options: Options
    ) -> None:
        if stream.room < len(frames):
            raise Refused(
                "UNAVAILABLE", f"{_name(sequence)} has room for {stream.room} more frames, {len(frames)} came: slower"
            )
        left = len(frames)
        failed = False

        def deliver(outcome: Result | Exception) -> None:
            self._answers.put(lambda: answer(outcome))

        def answer(outcome: Result | Exception) -> None:
            nonlocal left, failed
            left -= 1
            try:
                if not failed:  # a request is refused once
                    failed = isinstance(outcome, Exception)
                    self._answer(request, outcome, options, last=not left)
            finally:
                with self._lock:
                    sequence.pending -= 1
                    sequence.used = time.monotonic()
                    self._settle(sequence)

        for frame in frames:
            with self._lock:
                sequence.pending += 1
            try:
                stream.push(frame, deliver)
            except BaseException:
                with self._lock:
                    sequence.pending -= 1
                raise

    def _answer(self, request: Request, outcome: Result | Exception, options: Options, last: bool) -> None:
        if isinstance(outcome, Exception):
            status = "INVALID_ARGUMENT" if isinstance(outcome, InputError) else "INTERNAL"
            self._refuse_now(request, status, str(outcome))
            return
        outputs: dict[str, np.ndarray] = {}
        if protocol.IMAGE in request.wanted:
            outputs[protocol.IMAGE] = outcome.image
        if protocol.IMAGE_ENCODED in request.wanted and (options.encoding or not outputs):
            data = encode_image(outcome.image, options.encoding or "PNG", options.quality)
            outputs[protocol.IMAGE_ENCODED] = np.array([data], object)
        request.answer(outputs, last)

    def _warm_up(self, request: Request) -> None:
        """Run everything once, for a request that belongs to no sequence."""
        picture = np.random.default_rng(0).integers(0, 256, (self._streams.size,) * 2 + (3,)).astype(np.uint8)
        stream = self._streams.open(picture)
        try:
            stream.push(picture)
            stream.pull(timeout=600)
        finally:
            stream.close()
        self._answers.put(lambda: request.answer({}))

    # ------------------------------------------------------------------------------------------------------------------
    # pictures

    def _frames(self, request: Request) -> list[np.ndarray]:
        frames = self._pictures(request, protocol.FRAME, protocol.FRAME_ENCODED)
        if len(frames) > 1 and not request.many:
            raise InputError(f"a request holds one frame, got {len(frames)}: only {protocol.STREAM_MODEL} takes more")
        return frames

    def _pictures(self, request: Request, raw: str, encoded: str) -> list[np.ndarray]:
        """Each uint8 [size, size, 3], out of one input or the other; none where neither was sent."""
        images, data = request.input(raw), request.input(encoded)
        if images is not None and data is not None:
            raise InputError(f"send {raw} or {encoded}, not both")
        if data is not None:
            return [self._decode(encoded, each) for each in data.reshape(-1)]
        if images is None:
            return []
        side = self._streams.size
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise InputError(f"{raw} must be uint8 [1, {side}, {side}, 3], got {images.dtype} {list(images.shape)}")
        return list(images)

    def _decode(self, name: str, data: Any) -> np.ndarray:
        if not isinstance(data, bytes) or not 0 < len(data) <= protocol.MOST_ENCODED:
            got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
            raise InputError(f"{name} must be 1 to {protocol.MOST_ENCODED} bytes of {', '.join(ENCODINGS)}, got {got}")
        image = decode_image(data, name, ENCODINGS, self._settings.most_pixels)
        return center_square(image, self._streams.size)

    # ------------------------------------------------------------------------------------------------------------------
    # answers and ends

    def _refuse(self, request: Request, refusal: Refused) -> None:
        self._answers.put(lambda: self._refuse_now(request, refusal.status, str(refusal)))

    def _refuse_now(self, request: Request, status: str, message: str) -> None:
        self.refused += 1
        request.refuse(status, message)

    def _answer_all(self) -> None:
        while (answer := self._answers.get()) is not None:
            try:
                answer()
            except Exception:  # whoever asked is gone, say: the others still wait
                log.exception("an answer could not be sent")

    def _free_idle(self) -> None:
        while not self._closed.wait(min(1.0, self._settings.idle / 4)):
            late = time.monotonic() - self._settings.idle
            with self._lock:
                for sequence in list(self._open.values()):
                    if sequence.used < late and not sequence.busy and not sequence.pending:
                        sequence.ended = True
                        self._forget(sequence)
                        self._settle(sequence)

    # ------------------------------------------------------------------------------------------------------------------
    # all of these with the lock held

    def _start(self, request: Request, options: Options) -> _Sequence:
        known = self._open.get(request.sequence)
        if known is not None and not options.restart:
            raise Refused(
                "ALREADY_EXISTS",
                f"{_name(known)} is open already: END it first, take another id, or send the parameter restart",
            )
        if known is not None:
            known.ended = True
            self._forget(known)
            self._settle(known)
        if self._live >= self._settings.sequences:
            raise Refused("UNAVAILABLE", f"all {self._settings.sequences} sequences are open: try again later")
        sequence = self._open[request.sequence] = _Sequence(request.sequence)
        self._live += 1
        return sequence

    def _find(self, request: Request) -> _Sequence:
        if request.sequence in self._open:
            return self._open[request.sequence]
        raise Refused(
            "NOT_FOUND",
            f"sequence {request.sequence} is not open here (none was started, it ended, or nothing came for "
            f"{self._settings.idle:g} seconds): send START with its source",
        )

    def _forget(self, sequence: _Sequence) -> None:
        """Its id means nothing any more; what is under way is still answered."""
        if self._open.get(sequence.id) is sequence:
            del self._open[sequence.id]

    def _settle(self, sequence: _Sequence) -> None:
        """Free a sequence that has ended, once all of it is answered."""
        if sequence.settled or not sequence.ended or sequence.busy or sequence.mail or sequence.pending:
            return
        sequence.settled = True
        self._answers.put(lambda: self._free(sequence))

    # without it

    def _free(self, sequence: _Sequence) -> None:
        if sequence.stream is not None:
            sequence.stream.close()
        with self._lock:
            self._live -= 1


def _options(request: Request) -> Options:
    try:
        return Options.read(request.parameters)
    except InputError as error:
        raise Refused("INVALID_ARGUMENT", str(error)) from None


def _name(sequence: _Sequence) -> str:
    return f"sequence {sequence.id}"
