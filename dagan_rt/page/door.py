"""What a browser may ask the page's server for: everything else is refused before Gradio sees it.

Gradio's server can do more than this page needs (fetch addresses for clients, serve files, call other services). Here
is what the page needs, and nothing in a request names a file that is not an upload or a result of this server.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path, PurePath
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/gradio_api/"
FILE = f"{API}file="
PAGES = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    f"{API}startup-events",
    f"{API}info",
    f"{API}app_id",
)
READ = ("/assets/", "/static/", f"{API}heartbeat/", f"{API}queue/data", f"{API}upload_progress")
UPLOAD = f"{API}upload"
WRITE = (f"{API}queue/join", f"{API}cancel", f"{API}reset", f"{API}stream/")
MOST_JSON = 16 << 20  # bytes of a request that is no upload; pictures of a camera come in them

HEADERS = {
    # Nothing from elsewhere, whatever a part of Gradio asks for; some of its scripts are in the page, or made there.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(self), geolocation=()",
}


class Door:
    """An ASGI application in front of another."""

    def __init__(self, app: Any, folder: Path, most_bytes: int, hosts: tuple[str, ...]) -> None:
        """folder: where uploads and results lie. most_bytes: of an upload, all its files together.

        hosts: names by which the server may be called; none allows all.
        """
        self._app, self._folder, self._most_bytes, self._hosts = app, folder, most_bytes, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with why not."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        status, words = self._refused(scope)
        if not status and scope["method"] == "POST" and not _path(scope).startswith(UPLOAD):
            body = await _read(receive, MOST_JSON)
            status, words = self._refused_body(body)
            receive = _replay(body or b"", receive)
        if status:
            return await _answer(send, status, words)
        await self._app(scope, receive, _with_headers(send))

    def _refused(self, scope: Message) -> tuple[int, str]:
        """Status and reason, by address, method and size; (0, "") where nothing speaks against it."""
        headers, path, method = dict(scope["headers"]), _path(scope), scope["method"]
        # Against pages elsewhere that lead a name of theirs to this machine, or have a browser post to it.
        if self._hosts and not (_name(headers.get(b"host")) in self._hosts and self._own(headers.get(b"origin"))):
            return 400, "This server does not go by that name."
        if method in ("GET", "HEAD"):
            if path in PAGES or path.startswith(READ) or (path.startswith(FILE) and self._ours(path[len(FILE) :])):
                return 0, ""
            return 404, "There is nothing here."
        if method != "POST" or not path.startswith((UPLOAD, *WRITE)):
            return 404, "There is nothing here."
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "A request must say how long it is."
        most = self._most_bytes if path.startswith(UPLOAD) else MOST_JSON
        if int(length) > most:
            return 413, f"That is too large: {most / 1e6:.3g} MB are allowed."
        return 0, ""

    def _own(self, origin: bytes | None) -> bool:
        """Whether a request comes from the page itself, where a browser says from which."""
        return origin is None or _name(origin.partition(b"://")[2]) in self._hosts

    def _refused_body(self, body: bytes | None) -> tuple[int, str]:
        """The same, by the files that a request names."""
        try:
            paths = list(_paths(json.loads(body or b"{}")))
        except (ValueError, RecursionError):
            return 400, "That is no request of this page."
        if not all(self._ours(path) for path in paths):
            return 403, "That file was not uploaded here."
        return 0, ""

    def _ours(self, path: object) -> bool:
        """Whether a path names something inside the folder."""
        if not isinstance(path, str) or "\0" in path:
            return False
        pure = PurePath(path)
        return ".." not in pure.parts and pure != self._folder and pure.is_relative_to(self._folder)


def _name(host: bytes | None) -> str:
    """A host without its port."""
    return (host or b"").decode("latin-1").rsplit(":", 1)[0]


def _path(scope: Message) -> str:
    return str(scope["path"])


def _paths(value: Any) -> Iterator[object]:
    """All that stands under "path" in a tree of JSON; pictures of a camera come without one."""
    if isinstance(value, dict):
        if value.get("path") is not None:
            yield value["path"]
        for each in value.values():
            yield from _paths(each)
    elif isinstance(value, list):
        for each in value:
            yield from _paths(each)


async def _read(receive: Receive, most: int) -> bytes | None:
    """The body of a request; None where it is longer, or breaks off."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > most:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read once more."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message["headers"], *ours]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, words: str) -> None:
    body = json.dumps({"detail": words}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    sending = _with_headers(send)
    await sending({"type": "http.response.start", "status": status, "headers": headers})
    await sending({"type": "http.response.body", "body": body})
