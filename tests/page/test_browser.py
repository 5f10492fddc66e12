"""The page in a real browser: Chromium without a screen, of the system, with its own driver."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dagan_rt.page.runs import Studio
from dagan_rt.page.server import serving
from dagan_rt.reenactor import Reenactor
from dagan_rt.video import VideoReader

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs dagan-rt[demo]"),
    pytest.mark.skipif(find_spec("selenium") is None, reason="browsers are driven by selenium, of dagan-rt[dev]"),
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no Chromium here: apt-get install chromium chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def studio(tiny_bundle: Path) -> Studio:
    return Studio(tiny_bundle, "onnxruntime", 1, most_seconds=2)


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    with serving(studio) as address:
        yield address


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Any]:
    """The page as it opens, in a browser with a camera that shows a test picture."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in [
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "window-size=1280,1600",
        "disable-background-networking", "disable-component-update", "use-fake-device-for-media-stream",
        "use-fake-ui-for-media-stream",
    ]:  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    try:
        browser.get(address)
        until(lambda: found(browser, "#animate"))
        yield browser
    finally:
        browser.quit()


def found(page: Any, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """Wait for a condition and return what it is."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def give(page: Any, **files: Path) -> None:
    """Drop files into the parts of the page of these names, and wait until they are there."""
    for part, path in files.items():
        found(page, f"#{part} input[type=file]")[0].send_keys(str(path))
        until(lambda part=part: found(page, f"#{part} img, #{part} video"))


def words(page: Any) -> str:
    return page.execute_script("return document.querySelector('#words .words')?.textContent || ''")


def result(page: Any) -> str:
    """The picture that is shown of the result."""
    return page.execute_script("return document.querySelectorAll('#now figure')[2].querySelector('img')?.src || ''")


def asked_elsewhere(page: Any, address: str) -> list[str]:
    """What the browser wanted from other servers."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [it["params"]["request"]["url"] for it in events if it["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith((address, "data:", "blob:", "chrome:"))]


def test_a_clip_is_animated_watched_and_downloaded(
    page: Any, address: str, given: dict[str, Path], make_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = Reenactor.drive
    monkeypatch.setattr(Reenactor, "drive", lambda *of: (time.sleep(0.03), drive(*of))[1])  # so that it can be watched
    with VideoReader(given["clip"]) as reader:
        frames = list(reader)
    (tmp_path / "given").mkdir()
    clip = make_clip(tmp_path / "given" / "{{1}} ${2} <b>.mp4", frames * 6, sound=True)
    give(page, portrait=given["portrait"], clip=clip)
    found(page, "#paste input")[0].click()
    found(page, "#watermark input[value='visible']")[0].click()
    found(page, "#animate")[0].click()
    seen, said = set(), set()

    def over() -> bool:
        seen.add(result(page))
        said.add(words(page))
        return words(page).startswith("Done")

    until(over)
    assert len(seen - {""}) >= 3  # the result moved while the run went on
    assert any(sentence.startswith("Frame ") for sentence in said)
    titles = [element.text for element in found(page, "#inside figcaption b")]
    assert {"Motion transfer", "Source depth", "Dense flow", "Occlusion", "Attention"} <= set(titles)
    stages = [element.text for element in found(page, "#latency td:first-child")]
    assert stages == ["whole frame", "source", "initial", "driving", "motion", "generator"]
    video = until(lambda: found(page, "#result video"))[0]
    until(lambda: page.execute_script("return arguments[0].readyState", video) >= 2)
    assert page.execute_script("return [arguments[0].videoWidth, arguments[0].duration]", video) == [94, 1.92]
    until(lambda: found(page, "#download"))[0].click()
    until(lambda: [path for path in tmp_path.glob("*.mp4")])
    (downloaded,) = tmp_path.glob("*.mp4")
    with VideoReader(downloaded) as reader:
        assert len(list(reader)) == 48 and reader.has_audio and (reader.width, reader.height) == (94, 64)
    assert asked_elsewhere(page, address) == []


@pytest.mark.parametrize(
    ("portrait", "clip", "crop", "expected"),
    [
        ("text", "clip", "center", "Image text.png is not an image"),
        ("portrait", "broken", "center", "Video broken.mp4 is not a video this program reads"),
        ("portrait", "long", "center", "The clip long.mp4 is longer than 2 seconds: cut it first"),
        ("portrait", "faceless", "follow the face", "No face was found in faceless.mp4: choose center as the crop"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    page: Any, studio: Studio, given: dict[str, Path], portrait: str, clip: str, crop: str, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import numpy as np

    from dagan_rt.faces import Face

    face = Face(np.array([20, 20, 44, 44], np.float32), 0.9)
    monkeypatch.setattr(studio, "_detector", lambda image: [face] if np.ptp(image) > 40 else [])
    give(page, portrait=given[portrait], clip=given[clip])
    found(page, f"#crop input[value='{crop}']")[0].click()
    found(page, "#animate")[0].click()
    said = until(lambda: found(page, ".words.failed"))[0].text
    assert said.startswith(expected) and "/" not in said and "Traceback" not in page.page_source
    until(lambda: found(page, "#animate") and found(page, "#animate")[0].is_displayed())


def test_nothing_given_is_said(page: Any) -> None:
    found(page, "#animate")[0].click()
    until(lambda: words(page) == "Give a portrait first.")


def test_a_run_can_be_stopped(
    page: Any, studio: Studio, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = studio.line.join()
    give(page, portrait=given["portrait"], clip=given["clip"])
    found(page, "#animate")[0].click()
    until(lambda: words(page) == "Waiting: one run is before yours.")
    found(page, "#stop")[0].click()
    until(lambda: words(page) == "Stopped.")
    until(lambda: len(studio.line._tickets) == 1)
    studio.line.leave(ticket)


def test_the_camera_drives_the_portrait(page: Any, address: str, given: dict[str, Path]) -> None:
    give(page, portrait=given["portrait"])
    page.execute_script(
        "[...document.querySelectorAll('button[role=tab]')].find(it => it.textContent.includes('Live')).click()"
    )
    until(lambda: found(page, "#camera button"))
    for _ in range(2):  # first access to the camera, then recording
        until(lambda: [it for it in found(page, "#camera button") if it.is_displayed()])
        page.execute_script(
            "const all = [...document.querySelectorAll('#camera button')].filter(it => it.offsetParent);"
            "(all.find(it => /access|record|stream/i.test(it.textContent + it.ariaLabel + it.title)) || all[0]).click()"
        )
        time.sleep(2)
    until(lambda: words(page).startswith("Live"))
    first = result(page)
    until(lambda: result(page) != first)
    assert asked_elsewhere(page, address) == []


def test_portrait_and_clip_can_be_taken_with_the_camera(page: Any) -> None:
    script = """
        const [part, name, action] = arguments;
        const shown = [...document.querySelectorAll(`#${part} button`)].filter(it => it.offsetParent);
        const found = shown.find(it => [it.ariaLabel, it.title, it.textContent].some(words => words?.includes(name)));
        if (action) found?.click();
        return !!found;
    """

    def press(part: str, name: str) -> None:
        """The button of that name, once it is there."""
        until(lambda: page.execute_script(script, part, name, True), 20)

    def camera_of(part: str) -> None:
        press(part, "Capture from camera")
        press(part, "Access Webcam")
        until(lambda: page.execute_script(f"return document.querySelector('#{part} video')?.readyState >= 2"), 20)

    camera_of("portrait")
    press("portrait", "capture photo")
    until(lambda: page.execute_script(script, "portrait", "Remove Image", False), 20)
    camera_of("clip")
    press("clip", "Record")
    time.sleep(1.5)
    press("clip", "Stop")
    until(lambda: page.execute_script(script, "clip", "Clear", False), 20)
    found(page, "#animate")[0].click()
    until(lambda: words(page).startswith("Done") or found(page, ".words.failed"))
    assert words(page).startswith("Done"), words(page)


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    until(lambda: page.execute_script("return document.documentElement.scrollWidth") <= width, 10)
