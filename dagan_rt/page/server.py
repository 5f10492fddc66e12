"""The page on an address, until it is interrupted."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagan_rt.errors import InputError, require
from dagan_rt.page.runs import Studio

LOOPBACK = ("127.0.0.1", "localhost")


@contextmanager
def serving(
    studio: Studio, host: str = LOOPBACK[0], port: int = 0, *, most_megabytes: float = 100, browser: bool = False
) -> Iterator[str]:
    """Serve the page from threads of its own, and give its address; leaving the block ends it and deletes all files.

    port: 0 takes a free one. most_megabytes: of an upload. browser: open the page there.
    Raises MissingPackage without Gradio, InputError for a port that is taken. One page at a time in a process: Gradio
    keeps where files lie in an environment variable, set here and put back in the end.
    """
    require("gradio", extra="demo", why="the page")
    if not most_megabytes > 0:
        raise InputError(f"most_megabytes must be over 0, got {most_megabytes}")
    port = _port(host, port)
    folder = Path(tempfile.mkdtemp(prefix="dagan-rt-")).resolve()  # which only its owner can read
    try:
        with _environment(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1"):
            page = _launch(studio, folder, host, port, round(most_megabytes * 1e6), browser)
            try:
                yield f"http://{host}:{port}/"
            finally:
                page.close(verbose=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait() -> None:
    """Until Ctrl-C, which is raised as KeyboardInterrupt."""
    forever = threading.Event()
    while not forever.wait(3600):
        pass


def _launch(studio: Studio, folder: Path, host: str, port: int, most_bytes: int, browser: bool) -> Any:
    import gradio as gr
    from starlette.middleware import Middleware

    from dagan_rt.page.door import Door
    from dagan_rt.page.layout import build
    from dagan_rt.page.markup import STYLE

    hosts = LOOPBACK if host in LOOPBACK else ()
    door = Middleware(Door, folder=folder, most_bytes=most_bytes, hosts=hosts)  # type: ignore[arg-type]
    page = build(studio, folder)
    # Fonts of the machine: those of Gradio's own themes come from Google.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, inbrowser=browser, share=False,
        app_kwargs={"middleware": [door], "docs_url": None, "redoc_url": None, "openapi_url": None},
        max_file_size=most_bytes, allowed_paths=[], blocked_paths=[str(studio.bundle.path.resolve())],
        footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        show_error=False, state_session_capacity=64, theme=theme, css=STYLE,
    )  # fmt: skip
    return page


def _port(host: str, port: int) -> int:
    """The port, or a free one for 0."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the page cannot be served at {host}, port {port}: {reason}") from None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
