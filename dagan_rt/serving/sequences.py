"""Sequences of requests as streams: what the served model does, without a word of Triton.

Every request is answered exactly once, and nothing waits where there is no bound: a sequence has at most
`settings.queue` frames from the moment they are taken until they are answered, and what is more is refused at once.

Requests of a sequence are handled in order, one at a time: a raw frame on the thread that brings it, since it only has
to be copied; whatever must be decoded or computed by a pool. Its frames go on to its stream, which batches them with
those of the others. A START, and an END without a frame, wait until every frame before them is answered. Answers are
encoded and sent by a thread to which the sequence keeps, so they stay in order, too.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dagan_rt.errors import DeviceLost, InputError
from dagan_rt.images import ENCODINGS, center_square, decode_image, encode_image
from dagan_rt.reenactor import check_motion
from dagan_rt.serving import protocol
from dagan_rt.serving.protocol import Options, Settings
from dagan_rt.streams import QueueFull, Result, Stream, Streams

HANDLERS = 4  # threads that decode and compute sources; few, since the model needs the cores
ANSWERERS = 4  # threads that encode and send
MOST_WAITING = 256 << 20  # bytes of encoded images that wait to be decoded, of all sequences together
MOST_SCANS = 100  # of a progressive JPEG; a few bytes make a scan, and each takes a pass over all pixels
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
    inputs: dict[str, np.ndarray]  # those that were sent; copies, which are let go of once they are used
    wanted: Collection[str]  # names of outputs
    many: bool  # whether it may hold several frames, each of which gets an answer

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""

    def answer(self, outputs: Mapping[str, np.ndarray], last: bool = True) -> None:
        """Send outputs."""

    def refuse(self, status: str, message: str) -> None:
        """Send an error; the last thing said."""


@dataclass(eq=False)
class _Mail:
    """A request that was taken and is not handled yet."""

    request: Request
    options: Options
    frames: int  # how many it brings
    bytes: int  # of encoded images

    @property
    def weight(self) -> int:
        """What it takes of the sequence's queue."""
        return max(1, self.frames)

    @property
    def last(self) -> bool:
        """An END without a frame."""
        return self.request.end and not self.request.start and not self.frames

    @property
    def alone(self) -> bool:
        """Whether it must wait for all frames before it."""
        return self.request.start or self.last

    @property
    def quick(self) -> bool:
        """Whether it only has to be copied."""
        return bool(self.frames) and not (self.request.start or self.bytes or _only_points(self.request))


@dataclass(eq=False)
class _Sequence:
    """One session, from its START until its last answer."""

    id: int | str
    answers: ThreadPoolExecutor  # of one thread
    started: _Mail | None = None  # its latest START
    stream: Stream | None = None  # None before its START is handled, and after one that failed
    mail: deque[_Mail] = field(default_factory=deque)
    handling: bool = False  # whether a thread handles one of its requests
    taken: int = 0  # weight of all requests that are not answered yet
    frames: int = 0  # of these, the frames that were handed to the stream
    ended: bool = False  # its id means nothing any more; what was taken is still answered
    used: float = 0.0  # when a request came or was answered last, by time.monotonic()


class Sequences:
    """All sequences of one model instance."""

    def __init__(self, streams: Streams, settings: Settings) -> None:
        """streams: for at least `settings.sequences` streams and queues of `settings.queue`; closed with this."""
        self._streams, self._settings = streams, settings
        self._lock = threading.Lock()  # over all that follows, and over the sequences; not held while streams are asked
        self._open: dict[int | str, _Sequence] = {}
        self._places: set[_Sequence] = set()  # those open, and those that have ended and are not answered yet
        self._bytes = 0  # of encoded images that wait
        self._refused = 0
        self._closed = threading.Event()
        self.lost = threading.Event()  # set once a request failed because the device is gone: no later one can succeed
        self._pool = ThreadPoolExecutor(HANDLERS, "dagan-rt sequences")
        self._answerers = [ThreadPoolExecutor(1, "dagan-rt answers") for _ in range(ANSWERERS)]
        self._next_answerer = itertools.cycle(self._answerers)
        self._janitor = threading.Thread(target=self._free_idle, name="dagan-rt idle sequences", daemon=True)
        self._janitor.start()

    @property
    def open(self) -> int:
        """How many sequences are open."""
        with self._lock:
            return len(self._open)

    @property
    def refused(self) -> int:
        """How many requests were answered with an error so far."""
        with self._lock:
            return self._refused

    def accept(self, request: Request) -> None:
        """Take a request, whose answer comes from another thread, or refuse it at once. For one thread."""
        try:
            if request.sequence == 0:
                with self._lock:
                    self._check_open()
                    self._pool.submit(self._warm_up, request)
                return
            mail = self._read(request)
            with self._lock:
                sequence = self._take(mail)
        except Exception as error:
            if request.end:
                self._end(request.sequence)  # as it does for the server in front, whatever is wrong with the request
            self._refuse(request, error)
            return
        self._proceed(sequence, here=True)

    def close(self) -> None:
        """Refuse what is under way, and free everything. May be called twice."""
        with self._lock:
            self._closed.set()
            waiting = [(sequence, mail) for sequence in self._places for mail in sequence.mail]
            for sequence in self._places:
                sequence.mail.clear()
        for sequence, mail in waiting:
            self._settle(sequence, mail.weight)
            self._refuse(mail.request, Refused("UNAVAILABLE", "the model is being unloaded"))
        self._pool.shutdown()
        self._streams.close()
        for answerer in self._answerers:
            answerer.shutdown()
        self._janitor.join()

    # ------------------------------------------------------------------------------------------------------------------
    # taking requests

    def _read(self, request: Request) -> _Mail:
        """Check all that can be checked before anything is decoded."""
        options = Options.read(request.parameters)
        check_motion(options.motion, options.adapt_scale, options.motion_scale)
        sources = self._count(request, protocol.SOURCE, protocol.SOURCE_ENCODED)
        frames = self._count(request, protocol.FRAME, protocol.FRAME_ENCODED)
        if request.start and sources != 1:
            raise InputError(f"START must carry one source (source or source_encoded), got {sources}")
        if sources and not request.start:
            raise InputError("a source goes with START alone: send START with the parameter restart to change it")
        if frames > 1 and not request.many:
            raise InputError(f"a request holds one frame, got {frames}: only {protocol.STREAM_MODEL} takes more")
        if frames > self._settings.queue:
            raise InputError(f"a request holds at most {self._settings.queue} frames, the queue's size, got {frames}")
        if not (frames or request.start or request.end):
            raise InputError("a step must carry a frame: send frame or frame_encoded")
        encoded = [request.inputs.get(name) for name in (protocol.SOURCE_ENCODED, protocol.FRAME_ENCODED)]
        size = sum(len(data) for array in encoded if array is not None for data in array.reshape(-1))
        return _Mail(request, options, frames, size)

    def _count(self, request: Request, raw: str, encoded: str) -> int:
        """How many pictures one input or the other holds; those that have no right to are refused."""
        images, data = request.inputs.get(raw), request.inputs.get(encoded)
        if images is not None and data is not None:
            raise InputError(f"send {raw} or {encoded}, not both")
        if images is not None:
            side = self._streams.size
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (side, side, 3):
                raise InputError(f"{raw} must be uint8 [1, {side}, {side}, 3], got {images.dtype} {list(images.shape)}")
            return len(images)
        if data is None:
            return 0
        for each in data.reshape(-1):
            if not isinstance(each, bytes) or not 0 < len(each) <= protocol.MOST_ENCODED:
                got = f"{len(each)} bytes" if isinstance(each, bytes) else type(each).__name__
                kinds = ", ".join(ENCODINGS)
                raise InputError(f"{encoded} must be 1 to {protocol.MOST_ENCODED} bytes of {kinds}, got {got}")
        return data.size

    def _take(self, mail: _Mail) -> _Sequence:
        """Put a request into the mail of its sequence, or refuse it; with the lock held."""
        self._check_open()
        request, settings = mail.request, self._settings
        sequence = self._open.get(request.sequence)
        if request.start and sequence is None:
            if len(self._places) >= settings.sequences:
                raise Refused("UNAVAILABLE", f"all {settings.sequences} sequences are open: try again later")
            sequence = _Sequence(request.sequence, next(self._next_answerer))
        elif request.start and not mail.options.restart:
            raise Refused(
                "ALREADY_EXISTS",
                f"sequence {request.sequence} is open already: END it first, take another id, or send the parameter "
                "restart",
            )
        elif sequence is None:
            raise Refused(
                "NOT_FOUND",
                f"sequence {request.sequence} is not open here (none was started, its START failed, it ended, or "
                f"nothing came for {settings.idle:g} seconds): send START with its source",
            )
        if sequence.taken + mail.weight > settings.queue and not mail.last:
            raise Refused(
                "UNAVAILABLE", f"sequence {request.sequence} has {sequence.taken} of at most {settings.queue} frames "
                f"under way, {mail.weight} came: wait for their answers",
            )  # fmt: skip
        if self._bytes + mail.bytes > MOST_WAITING:
            raise Refused("UNAVAILABLE", "too many encoded images wait to be decoded: try again later")
        self._bytes += mail.bytes
        self._places.add(sequence)
        self._open[sequence.id] = sequence
        sequence.mail.append(mail)
        sequence.taken += mail.weight
        sequence.used = time.monotonic()
        if request.start:
            sequence.started = mail
        if request.end:
            self._forget(sequence)
        return sequence

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Refused("UNAVAILABLE", "the model is being unloaded")

    # ------------------------------------------------------------------------------------------------------------------
    # handling them

    def _proceed(self, sequence: _Sequence, here: bool = False) -> None:
        """Handle the next request, if it is its turn; on this thread if it is `here` and takes no time."""
        with self._lock:
            if sequence.handling or not sequence.mail or (sequence.mail[0].alone and sequence.frames):
                return
            mail = sequence.mail.popleft()
            sequence.handling = True
            if not (here and mail.quick):
                self._pool.submit(self._handle, sequence, mail)
                return
        self._handle(sequence, mail)

    def _handle(self, sequence: _Sequence, mail: _Mail) -> None:
        request = mail.request
        try:
            self._serve(sequence, mail)
        except Exception as error:
            if (
                request.start and sequence.stream is None
            ):  # otherwise it was a restart, and what it would replace goes on
                self._fail(sequence, mail)
            self._answer(sequence, mail.weight, self._refuse, request, error)
        request.inputs.clear()
        with self._lock:
            self._bytes -= mail.bytes
            sequence.handling = False
        self._proceed(sequence)

    def _serve(self, sequence: _Sequence, mail: _Mail) -> None:
        request, options = mail.request, mail.options
        if not mail.quick and request.cancelled():
            raise Refused("CANCELLED", "nobody waits for this request any more")
        sources = self._pictures(request, protocol.SOURCE, protocol.SOURCE_ENCODED)
        frames = self._pictures(request, protocol.FRAME, protocol.FRAME_ENCODED)
        if request.start:
            if sequence.stream is not None:  # a restart
                sequence.stream.close()
                sequence.stream = None
            sequence.stream = self._streams.open(
                sources[0], options.motion, options.adapt_scale, motion_scale=options.motion_scale
            )
        if sequence.stream is None:
            raise Refused("NOT_FOUND", f"sequence {sequence.id} is not open: its START failed; send START again")
        if not frames:
            self._answer(sequence, 1, request.answer, {})
        elif _only_points(request):
            found = [self._streams.keypoints(frame) for frame in frames]
            for number, points in enumerate(found, 1):
                outputs = {name: getattr(points, name.removeprefix("kp_")) for name in request.wanted}
                self._answer(sequence, 1, request.answer, outputs, number == len(found))
        else:
            self._push(sequence, sequence.stream, mail, frames)

    def _push(self, sequence: _Sequence, stream: Stream, mail: _Mail, frames: list[np.ndarray]) -> None:
        """Hand frames to the stream; each one's outcome is answered as it comes, but a request is refused only once."""
        request = mail.request
        left, failed = len(frames), False

        def answer(outcome: Result | Exception) -> None:
            nonlocal left, failed
            left -= 1
            if failed:
                return
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                outputs = self._outputs(request, mail.options, outcome.image)
            except Exception as error:
                failed = True
                if request.start:
                    self._fail(sequence, mail)
                self._refuse(request, error)
            else:
                request.answer(outputs, not left)

        def deliver(outcome: Result | Exception) -> None:
            self._answer(sequence, 1, answer, outcome, frames=1)

        with self._lock:
            sequence.frames += len(frames)
        for frame in frames:
            try:
                stream.push(frame, deliver)
            except Exception as error:
                deliver(error)

    def _outputs(self, request: Request, options: Options, image: np.ndarray) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        if protocol.IMAGE in request.wanted:
            outputs[protocol.IMAGE] = image
        if protocol.IMAGE_ENCODED in request.wanted and (options.encoding or not outputs):
            data = encode_image(image, options.encoding or "PNG", options.quality)
            outputs[protocol.IMAGE_ENCODED] = np.array([data], object)
        return outputs

    def _pictures(self, request: Request, raw: str, encoded: str) -> list[np.ndarray]:
        """Each uint8 [size, size, 3], out of one input or the other; none where neither was sent."""
        if encoded in request.inputs:
            return [self._decode(encoded, data) for data in request.inputs[encoded].reshape(-1)]
        return list(request.inputs.get(raw, ()))

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MOST_SCANS:
            raise InputError(f"{name} is a JPEG of too many scans: {MOST_SCANS} are allowed")
        return center_square(decode_image(data, name, ENCODINGS, self._settings.most_pixels), self._streams.size)

    def _warm_up(self, request: Request) -> None:
        """Run everything once, for a request that belongs to no sequence."""
        picture = np.random.default_rng(0).integers(0, 256, (self._streams.size,) * 2 + (3,)).astype(np.uint8)
        try:
            stream = self._streams.open(picture)
            try:
                stream.push(picture)
                stream.pull(timeout=600)
            finally:
                stream.close()
            request.answer({})
        except Exception as error:
            self._refuse(request, error)

    # ------------------------------------------------------------------------------------------------------------------
    # answers and ends; called without the lock

    def _answer(self, sequence: _Sequence, weight: int, send: Callable[..., None], *args: Any, frames: int = 0) -> None:
        """Have something sent, by which so much of the sequence's queue is free again. Returns at once."""

        def work() -> None:
            self._settle(sequence, weight, frames)
            try:
                send(*args)
            except Exception:  # whoever asked is gone, say: the others still wait
                log.exception("an answer could not be sent")

        sequence.answers.submit(work)

    def _settle(self, sequence: _Sequence, weight: int, frames: int = 0) -> None:
        """Count off what is answered. Its place is free before the last answer comes, so that START may follow it."""
        with self._lock:
            sequence.taken -= weight
            sequence.frames -= frames
            sequence.used = time.monotonic()
            through = sequence.ended and not sequence.taken
        if through:
            self._free(sequence)
        self._proceed(sequence)

    def _refuse(self, request: Request, error: Exception) -> None:
        """Answer with an error, by its kind."""
        status, message = "INTERNAL", f"{type(error).__name__}: {error}"
        if isinstance(error, Refused):
            status, message = error.status, str(error)
        elif isinstance(error, QueueFull) or self._closed.is_set():
            status = "UNAVAILABLE"
        elif isinstance(error, InputError):
            status, message = "INVALID_ARGUMENT", str(error)
        else:
            log.error("a request of sequence %s failed", request.sequence, exc_info=error)
        if isinstance(error, DeviceLost):
            self.lost.set()
        with self._lock:
            self._refused += 1
        try:
            request.refuse(status, message)
        except Exception:
            log.exception("an answer could not be sent")

    def _end(self, id: int | str) -> None:
        """END of a sequence whose request is refused, if there is one."""
        with self._lock:
            sequence = self._open.get(id)
            if sequence is not None:
                self._forget(sequence)
            through = sequence is not None and not sequence.taken
        if sequence is not None and through:
            self._free(sequence)

    def _fail(self, sequence: _Sequence, start: _Mail) -> None:
        """Its START failed: it ends, unless another one came meanwhile."""
        with self._lock:
            if sequence.started is start:
                self._forget(sequence)
            through = sequence.ended and not sequence.taken
        if through:
            self._free(sequence)

    def _forget(self, sequence: _Sequence) -> None:
        """Its id means nothing any more; with the lock held."""
        sequence.ended = True
        if self._open.get(sequence.id) is sequence:
            del self._open[sequence.id]

    def _free(self, sequence: _Sequence) -> None:
        """Give back the place of a sequence of which nothing is left."""
        if sequence.stream is not None:
            sequence.stream.close()
        with self._lock:
            self._places.discard(sequence)

    def _free_idle(self) -> None:
        while not self._closed.wait(min(1.0, self._settings.idle / 4)):
            late = time.monotonic() - self._settings.idle
            with self._lock:
                idle = [sequence for sequence in self._open.values() if sequence.used < late and not sequence.taken]
                for sequence in idle:
                    self._forget(sequence)
            for sequence in idle:
                self._free(sequence)


def _only_points(request: Request) -> bool:
    return bool(request.wanted) and set(request.wanted) <= set(protocol.POINTS)
