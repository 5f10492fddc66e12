"""What stands where on the page, and which button does what."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dagan_rt.errors import InputError
from dagan_rt.images import decode_image
from dagan_rt.page import markup
from dagan_rt.page.runs import Live, Request, State, Studio

FORGOTTEN = 3600  # seconds after which uploads and results are deleted, looked for every tenth of that
MOST_CAMERA_PIXELS = 4_000_000
LIVE_FOR = 300  # seconds after which a camera has to be started again
LIVE_EVERY = 0.1  # seconds from one picture of the camera to the next, at least

CROPS = {"center": "center", "follow the face": "auto"}
MARKS = {"none": "", "visible": "visible", "invisible": "invisible"}
OPENED = State("Give a portrait and a clip, then press Animate.")


def build(studio: Studio, folder: Path) -> gr.Blocks:
    """The page; `folder` is for results."""
    with gr.Blocks(title="dagan-rt", analytics_enabled=False, delete_cache=(FORGOTTEN // 10, FORGOTTEN)) as page:
        gr.HTML(_heading(studio), elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                portrait: Any = gr.Image(
                    label="Portrait", type="filepath", sources=["upload", "webcam"], height=220, elem_id="portrait"
                )
                with gr.Tabs():
                    with gr.Tab("Clip", elem_id="clip-tab"):
                        clip = gr.Video(
                            label=f"Clip, at most {studio.most_seconds:g} seconds", sources=["upload", "webcam"],
                            include_audio=True, height=300, elem_id="clip", buttons=[],
                        )  # fmt: skip
                        animate = gr.Button("Animate", variant="primary", elem_id="animate")
                        stop = gr.Button("Stop", visible=False, elem_id="stop")
                    with gr.Tab("Live camera", elem_id="live-tab"):
                        camera: Any = gr.Image(
                            label="Camera", sources=["webcam"], streaming=True, height=220, elem_id="camera", buttons=[]
                        )
                        again = gr.Button("Measure motion from this pose on", elem_id="again")
                motion = gr.Radio(
                    ["relative", "absolute"], value="relative", label="Motion", elem_id="motion",
                    info="relative: move as the driver does; absolute: take over the driver's pose",
                )  # fmt: skip
                adapt = gr.Checkbox(label="Adapt the motion's scale to the faces", elem_id="adapt")
                scale = gr.Slider(0, 2, 1, step=0.1, label="How far it moves", elem_id="scale")
                crop = gr.Radio(list(CROPS), value="center", label="Crop", elem_id="crop")
                paste = gr.Checkbox(label="Put the result back into the whole portrait", elem_id="paste")
                watermark = gr.Radio(
                    list(MARKS), value="none", label="Mark the video as synthetic", elem_id="watermark",
                    info="visible: a word in its corner; invisible: a pattern that dagan-rt info finds",
                )  # fmt: skip
            with gr.Column(scale=4, min_width=320):
                words = gr.HTML(markup.progress(OPENED), elem_id="words")
                pictures = gr.HTML(markup.now(OPENED), elem_id="now")
                times = gr.HTML("", elem_id="latency")
                video = gr.Video(
                    label="Result", visible=False, interactive=False, height=340, elem_id="result", buttons=[]
                )
                download = gr.DownloadButton("Download the result", visible=False, elem_id="download")
        inside = gr.HTML(markup.inside(OPENED, studio.blind), elem_id="inside")
        # Not opened by Gradio, where Pillow would take any format and size.
        portrait.preprocess, camera.preprocess = _path, _sent
        parts: list[Any] = [portrait, camera, clip, video, download]
        for part in parts:  # their examples are addresses elsewhere
            part.example_payload = part.example_value = _none
        session = gr.State(None, time_to_live=FORGOTTEN, delete_callback=_close)

        do = _Handlers(studio, folder)
        options, shown = [motion, adapt, scale, crop], [words, pictures, times, inside]
        # `most` people in the studio's line, which tells each how many stand in front; further ones it refuses.
        many: dict[str, Any] = {"concurrency_limit": studio.line.most + 1, "concurrency_id": "runs"}
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        run = animate.click(
            do.animate,
            [portrait, clip, *options, paste, watermark],
            [*shown, video, download, animate, stop],
            **many,
            **quiet,
        )
        stop.click(do.stop, None, [words, animate, stop], cancels=run, **quiet)
        camera.stream(
            do.live, [camera, session, portrait, *options], [session, *shown], stream_every=LIVE_EVERY,
            time_limit=LIVE_FOR, **many, **quiet,
        )  # fmt: skip
        again.click(do.again, session, None, **quiet)
        motion.change(do.chosen, motion, [adapt, scale], **quiet)
    page.queue(max_size=4 * studio.line.most)
    return page


class _Handlers:
    """What the buttons do."""

    def __init__(self, studio: Studio, folder: Path) -> None:
        self._studio, self._folder = studio, folder

    def animate(
        self,
        portrait: str | None,
        clip: str | None,
        motion: str,
        adapt: bool,
        scale: float,
        crop: str,
        paste: bool,
        watermark: str,
    ) -> Iterator[tuple[Any, ...]]:
        """A run from beginning to end, as values for the components."""
        looked_at = -1
        if portrait is None or clip is None:
            missing = "portrait" if portrait is None else "clip"
            state = State(f"Give a {missing} first.", failed=True)
            yield *self._shown(state), *_result(None), gr.skip(), gr.skip()
            return
        request = Request(
            Path(portrait), Path(clip), self._folder, motion, adapt, scale, CROPS[crop], paste, MARKS[watermark]
        )
        for state in self._studio.run(request):
            shown = self._shown(state, again=state.looked_at != looked_at)
            looked_at = state.looked_at or -1
            over = state.failed or state.video is not None
            yield *shown, *_result(state.video), gr.update(visible=over), gr.update(visible=not over)

    def stop(self) -> tuple[Any, ...]:
        """After the run was cancelled."""
        return markup.progress(State("Stopped.")), gr.update(visible=True), gr.update(visible=False)

    def live(self, picture: bytes, session: _Session | None, portrait: str | None, *options: Any) -> tuple[Any, ...]:
        """The state after a picture of the camera; a session lasts until the portrait or an option changes."""
        if portrait is None:
            return session, *self._shown(State("Give a portrait first.", failed=True))
        try:
            image = decode_image(picture, "the camera's picture", most_pixels=MOST_CAMERA_PIXELS)
            if session is None or session.of != (portrait, *options):
                _close(session)
                session = _Session(self._studio, portrait, *options)
        except InputError as error:
            return session, *self._shown(State(self._studio.told(error), failed=True))
        state = session.live.drive(image)
        shown = self._shown(state, again=state.looked_at != session.looked_at)
        session.looked_at = state.looked_at
        return session, *shown

    def again(self, session: _Session | None) -> None:
        """Begin relative motion anew."""
        if session is not None:
            session.live.reset()

    def chosen(self, motion: str) -> tuple[Any, Any]:
        """The scales are those of relative motion."""
        if motion == "relative":
            return gr.update(interactive=True), gr.update(interactive=True)
        return gr.update(interactive=False, value=False), gr.update(interactive=False, value=1)

    def _shown(self, state: State, again: bool = True) -> tuple[Any, ...]:
        """A state as values of the four parts; what is inside the networks only where it is drawn again."""
        drawn = markup.inside(state, self._studio.blind) if again else gr.skip()
        return markup.progress(state), markup.now(state), markup.latency(state.latency), drawn


class _Session:
    """Somebody's camera session, and what it was begun with."""

    def __init__(self, studio: Studio, portrait: str, motion: str, adapt: bool, scale: float, crop: str) -> None:
        self.of = portrait, motion, adapt, scale, crop
        self.live: Live = studio.live(Path(portrait), motion, adapt, scale, CROPS[crop])
        self.looked_at: int | None = None


def _result(video: Path | None) -> tuple[Any, Any]:
    """The video and its button; Gradio changes what it is given, so each has its own."""
    value = None if video is None else str(video)
    return gr.update(value=value, visible=video is not None), gr.update(value=value, visible=video is not None)


def _path(payload: Any) -> Any:
    """Where an upload lies, or None."""
    return None if payload is None else payload.path


def _sent(payload: Any) -> bytes:
    """A camera's picture, still encoded; empty where there is none."""
    kind, _, data = ("" if payload is None else payload.url or "").partition(";base64,")
    try:
        return base64.b64decode(data) if kind.startswith("data:image/") else b""
    except binascii.Error:
        return b""


def _none() -> None:
    return None


def _close(session: _Session | None) -> None:
    if session is not None:
        session.live.close()


def _heading(studio: Studio) -> str:
    model = f"{studio.bundle.config.variant}, {studio.size} × {studio.size} pixels, backend {studio.backend_name}"
    return (
        "<h1>The portrait moves as the clip does</h1>"
        f"<p>DaGAN on this machine: {escape(model)}. Nothing leaves it; uploads are deleted when it stops, at the "
        "latest after an hour.</p>"
    )
