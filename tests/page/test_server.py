"""The page's server, spoken to without a browser."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dagan_rt.errors import InputError
from dagan_rt.page.runs import Studio
from dagan_rt.page.server import serving
from dagan_rt.video import VideoReader

# Not imported here: it takes two seconds, in the processes that run other files, too.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs dagan-rt[demo]")

MEGABYTES = 0.5


class Browser:
    """As much of one as it takes to press the button."""

    def __init__(self, address: str, session: str = "somebody") -> None:
        self.address, self.session = address, session
        self.host = urllib.parse.urlsplit(address).netloc

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection(self.host, timeout=120)
        connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if isinstance(body, bytes):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, data, answer.headers

    def json(self, path: str, body: Any) -> tuple[int, Any]:
        status, data, _ = self.ask("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return status, json.loads(data)

    def upload(self, *paths: Path) -> tuple[int, Any]:
        edge = b"--------edge"
        parts = b"".join(
            b'--%s\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
            % (edge, path.name.encode(), path.read_bytes())
            for path in paths
        )
        kind = {"Content-Type": f"multipart/form-data; boundary={edge.decode()}"}
        status, data, _ = self.ask("POST", "/gradio_api/upload", parts + b"--%s--\r\n" % edge, kind)
        return status, json.loads(data)

    def animate(self, portrait: Any, clip: Any, *options: Any) -> tuple[int, Any]:
        """Press the button; the answer of the queue."""
        data = [portrait, clip, *(options or ("relative", False, 1, "center", False, "none"))]
        return self.json("/gradio_api/queue/join", {"data": data, "fn_index": 0, "session_hash": self.session})

    def messages(self) -> list[dict[str, Any]]:
        """All that the server says until the run is over."""
        _, data, _ = self.ask("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        return [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]

    def file(self, path: str) -> dict[str, Any]:
        return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def studio(tiny_bundle: Path) -> Studio:
    return Studio(tiny_bundle, "onnxruntime", 1, most_seconds=2)


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    with serving(studio, most_megabytes=MEGABYTES) as address:
        yield address


@pytest.fixture
def browser(address: str, request: pytest.FixtureRequest) -> Browser:
    return Browser(address, request.node.name[:20])


@pytest.fixture(scope="module")
def uploaded(address: str, given: dict[str, Path]) -> dict[str, str]:
    """Where the files lie on the server, by name."""
    status, paths = Browser(address).upload(*given.values())
    assert status == 200
    return dict(zip(given, paths, strict=True))


def words_of(messages: list[dict[str, Any]]) -> str:
    """All sentences of a run."""
    return " ".join(re.findall(r'role="status">(.*?)</div>', json.dumps(messages).replace('\\"', '"')))


def test_the_page_asks_for_nothing_elsewhere(browser: Browser) -> None:
    status, page, headers = browser.ask("GET", "/")
    assert status == 200
    # What only search engines read, and nobody fetches, may name Gradio's address.
    text = re.sub(r'<meta\s+(?:property|name)="(?:og|twitter):[^>]*>', "", page.decode())
    named = {url for url in re.findall(r"https?://[^\"'\s<>)\\]+", text) if not url.startswith(browser.address[:-1])}
    assert named == set()
    assert not re.search(r"(?:src|href)=[\"']?//|@import|url\(['\"]?(?:https?:)?//", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; ") and "http" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, theme, _ = browser.ask("GET", "/theme.css")
    assert status == 200 and b"@import" not in theme
    assert [url for url in re.findall(rb"url\(['\"]?(.{5})", theme) if url != b"data:"] == []
    config = json.loads(browser.ask("GET", "/config")[1])
    assert config["enable_queue"] and not config["analytics_enabled"] and config["stylesheets"] == []


def test_no_file_but_uploads_and_results_is_served(
    browser: Browser, studio: Studio, uploaded: dict[str, str], given: dict[str, Path]
) -> None:
    folder = Path(uploaded["clip"]).parents[1]
    status, data, _ = browser.ask("GET", f"/gradio_api/file={uploaded['clip']}")
    assert status == 200 and data == given["clip"].read_bytes()
    for path in [
        "/gradio_api/file=/etc/passwd", f"/gradio_api/file={studio.bundle.path}/manifest.json",
        f"/gradio_api/file={folder}/../../etc/passwd", f"/gradio_api/file={folder}/%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=etc/passwd", f"/gradio_api/file={folder}", f"/gradio_api/file={folder}x/a",
        f"/gradio_api/file={given['clip']}", f"/gradio_api/file={browser.address}", "/gradio_api/file/etc/passwd",
        f"/gradio_api/proxy={browser.address}", "/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/routes.py",
        "/svelte/../routes.py", "/monitoring", "/docs", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/runs",
        "/gradio_api/run-history/buckets", "/gradio_api/deep_link?session_hash=x", "/login", "/gradio_api/mcp",
    ]:  # fmt: skip
        status, data, headers = browser.ask("GET", path)
        assert status in (403, 404), path
        assert b"root:" not in data and b"import " not in data and b"dagan-rt bundle" not in data, path
        assert "default-src 'self'" in headers["Content-Security-Policy"], path


def test_no_request_opens_a_file_that_was_not_uploaded(
    browser: Browser, studio: Studio, uploaded: dict[str, str], given: dict[str, Path]
) -> None:
    clip, folder = browser.file(uploaded["clip"]), Path(uploaded["clip"]).parents[1]
    for path in [
        "/etc/passwd", f"{studio.bundle.path}/manifest.json", str(given["portrait"]), "portrait.png", "", 7,
        f"{folder}/../../etc/passwd", f"{folder}", "https://example.org/a.png", f"{browser.address}a.png",
        "file:///etc/passwd", "data:image/png;base64,AAAA",
    ]:  # fmt: skip
        for portrait in [browser.file(path), {"path": path}, {"path": path, "url": uploaded["portrait"]},
                         {"image": [browser.file(path)]}]:  # fmt: skip
            status, answer = browser.animate(portrait, clip)
            assert (status, answer) == (403, {"detail": "That file was not uploaded here."}), portrait
    assert browser.ask("POST", "/gradio_api/queue/join", b"{not json")[0] == 400
    assert browser.ask("POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400
    for path in ("/gradio_api/run/animate", "/gradio_api/call/animate", "/gradio_api/component_server", "/login"):
        assert browser.json(path, {"data": []})[0] == 404


def test_gradio_itself_refuses_as_well(
    browser: Browser, uploaded: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagan_rt.page.door import Door

    monkeypatch.setattr(Door, "_ours", lambda self, path: True)
    assert browser.animate(browser.file("/etc/passwd"), browser.file(uploaded["clip"]))[0] == 200
    messages = browser.messages()
    assert messages[-2]["msg"] == "process_completed" and not messages[-2]["success"]
    assert "root:" not in json.dumps(messages)


def test_an_upload_is_refused_before_it_is_read(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "large.mp4").write_bytes(bytes(600_000))
    assert browser.upload(tmp_path / "large.mp4") == (413, {"detail": "That is too large: 0.5 MB are allowed."})
    (tmp_path / "half.mp4").write_bytes(bytes(300_000))
    assert browser.upload(tmp_path / "half.mp4", tmp_path / "half.mp4")[0] == 413
    assert browser.ask("POST", "/gradio_api/upload", None, {"Transfer-Encoding": "chunked"})[0] == 411
    assert browser.upload(tmp_path / "half.mp4")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "localhost.evil:80"}],
)
def test_other_names_and_origins_are_refused(browser: Browser, headers: dict[str, str]) -> None:
    status, data, _ = browser.ask("GET", "/", headers=headers)
    assert status == 400 and json.loads(data) == {"detail": "This server does not go by that name."}


def test_a_run_over_http(browser: Browser, uploaded: dict[str, str], studio: Studio) -> None:
    assert browser.animate(*map(browser.file, (uploaded["portrait"], uploaded["clip"])))[0] == 200
    messages = browser.messages()
    assert "Reading the portrait and the clip." in words_of(messages) and "Done: 8 frames" in words_of(messages)
    (result,) = set(re.findall(r'"path": "([^"]*result\.mp4)"', json.dumps(messages)))
    status, data, _ = browser.ask("GET", f"/gradio_api/file={result}")
    assert status == 200 and data == Path(result).read_bytes()
    with VideoReader(result) as reader:
        assert len(list(reader)) == 8 and reader.has_audio


@pytest.mark.parametrize(
    ("portrait", "clip", "expected"),
    [
        ("text", "clip", "Image text.png is not an image"),
        ("portrait", "broken", "Video broken.mp4 is not a video this program reads"),
        ("portrait", "long", "The clip long.mp4 is longer than 2 seconds"),
        (None, "clip", "Give a portrait first."),
    ],
)
def test_errors_are_sentences(
    browser: Browser, uploaded: dict[str, str], portrait: str | None, clip: str, expected: str
) -> None:
    given = None if portrait is None else browser.file(uploaded[portrait])
    assert browser.animate(given, browser.file(uploaded[clip]))[0] == 200
    said = words_of(browser.messages())
    assert expected in said and "Traceback" not in said and "/" not in said


def test_two_people_do_not_see_each_other(
    address: str, uploaded: dict[str, str], tmp_path: Path, studio: Studio
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "noise.png")
    people = [Browser(address, "first-person"), Browser(address, "second-person")]
    (noise,) = people[1].upload(tmp_path / "noise.png")[1]
    said: dict[str, list[dict[str, Any]]] = {}
    ticket = studio.line.join()
    for person, portrait in zip(people, (uploaded["portrait"], noise), strict=True):
        assert person.animate(person.file(portrait), person.file(uploaded["clip"]))[0] == 200
    threads = [threading.Thread(target=lambda it=it: said.update({it.session: it.messages()})) for it in people]
    for thread in threads:
        thread.start()
    time.sleep(3)  # both are told every second how many stand in front
    studio.line.leave(ticket)
    for thread in threads:
        thread.join()
    results = [set(re.findall(r'"path": "([^"]*result\.mp4)"', json.dumps(said[person.session]))) for person in people]
    assert [len(paths) for paths in results] == [1, 1] and results[0] != results[1]
    assert all("Waiting: one run is before yours." in words_of(messages) for messages in said.values())
    assert "Waiting: 2 runs are before yours." in "".join(words_of(messages) for messages in said.values())
    assert Path(results[0].pop()).read_bytes() != Path(results[1].pop()).read_bytes()


def test_somebody_who_leaves_ends_the_run(address: str, uploaded: dict[str, str], studio: Studio) -> None:
    leaver = Browser(address, "leaver")
    assert leaver.animate(leaver.file(uploaded["portrait"]), leaver.file(uploaded["clip"]))[0] == 200
    connection = http.client.HTTPConnection(leaver.host, timeout=60)
    connection.request("GET", "/gradio_api/queue/data?session_hash=leaver")
    answer = connection.getresponse()
    while b"Reading the portrait" not in answer.readline():
        pass
    connection.close()
    answer.close()
    deadline = time.monotonic() + 60
    while studio.line._tickets and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not studio.line._tickets


def test_files_are_private_and_gone_in_the_end(studio: Studio, given: dict[str, Path]) -> None:
    # A second page in this process takes over where Gradio keeps files, so this is the last test.
    with serving(studio) as address:
        (path,) = Browser(address).upload(given["portrait"])[1]
        folder = Path(path).parents[1]
        assert folder.stat().st_mode & 0o077 == 0 and Path(path).is_file()
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        with pytest.raises(InputError, match=f"cannot be served at 127.0.0.1, port {port}"), serving(studio, port=port):
            pass
    assert not folder.exists()
    with pytest.raises(ConnectionRefusedError):
        Browser(address).ask("GET", "/")
