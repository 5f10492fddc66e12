"""A state of a run as HTML: pictures are in it, so that nothing of a run lies in a file that somebody could ask for."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from dagan_rt.images import encode_image
from dagan_rt.page.runs import Row, State

if TYPE_CHECKING:
    from collections.abc import Sequence

STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
footer { display: none !important; }
#clip video { max-height: 250px; }  /* of 300: the buttons stand below it */
.heading h1 { margin: 0 0 .15em; font-size: 1.6rem; }
.heading p, .pictures figcaption, .hint, .latency td.note { color: color-mix(in srgb, currentColor 72%, transparent); }
.heading p { margin: 0; }
.words { font-size: 1.05rem; min-height: 1.6em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.words.failed { color: #b42318; background: #fef3f2; border: 1px solid #fda29b; border-radius: 8px;
  padding: .6em .9em; }
.bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; margin-top: .4em; }
.bar div { height: 100%; background: var(--color-accent); }
.pictures { display: grid; gap: 12px; }
.pictures.now { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.pictures.inside { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); margin-top: 12px; }
.pictures figure { margin: 0; min-width: 0; }
.pictures img, .pictures .empty { width: 100%; aspect-ratio: 1; border-radius: 8px; display: block; margin: 0; }
.pictures .empty { background: var(--background-fill-secondary); border: 1px dashed var(--border-color-primary); }
.pictures figcaption { font-size: .8rem; line-height: 1.35; margin-top: .35em; }
.pictures figcaption b, .hint h3 { display: block; font-size: .95rem; color: var(--body-text-color); font-weight: 600; }
.hint { font-size: .85rem; }
.hint h3 { margin: .6em 0 0; font-size: 1.05rem; }
table.latency { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  margin: 0; }
table.latency, table.latency tbody, table.latency tr { border: 0 !important; }
table.latency td { padding: .3em .8em .3em 0 !important; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.latency td.ms { text-align: right; white-space: nowrap; }
table.latency tr:first-child td { font-weight: 600; }
@media (max-width: 640px) {
  .pictures { gap: 8px; }
  .pictures.inside { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .latency td.note { font-size: .8rem; }
}
"""


def progress(state: State) -> str:
    """The sentence of a state and, where the clip says how long it is, how far it is."""
    words = f'<div class="words{" failed" if state.failed else ""}" role="status">{escape(state.words)}</div>'
    if state.failed or not state.total:
        return words
    share = min(state.done / state.total, 1)
    return f'{words}<div class="bar"><div style="width: {100 * share:.1f}%"></div></div>'


def now(state: State) -> str:
    """Source, driving frame and result, side by side."""
    shown = (
        ("Source", "the portrait as the model sees it", state.source),
        ("Driver", "what drives, as the model sees it", state.driving),
        ("Result", "the portrait's answer", state.result),
    )
    figures = "".join(_figure(title, words, picture) for title, words, picture in shown)
    return f'<div class="pictures now">{figures}</div>'


def inside(state: State, blind: str) -> str:
    """What was seen inside the networks; `blind` says why nothing is."""
    if blind:
        return f'<div class="hint"><h3>Inside the model</h3>{escape(blind)}</div>'
    if state.looked_at is None:
        told = "Key points, depth maps, flow, occlusion and attention appear here while a run goes on."
        return f'<div class="hint"><h3>Inside the model</h3>{told}</div>'
    figures = "".join(_figure(panel.title, panel.words, panel.picture) for panel in state.panels)
    told = f"As it was at frame {state.looked_at}. Frames are looked into as often as a quarter of the time allows."
    return f'<div class="hint"><h3>Inside the model</h3>{told}</div><div class="pictures inside">{figures}</div>'


def latency(rows: Sequence[Row]) -> str:
    """The table of latencies; empty where nothing was measured yet."""
    if not rows:
        return ""
    lines = "".join(
        f'<tr><td>{escape(row.what)}</td><td class="ms">{1000 * row.seconds:.1f} ms</td>'
        f'<td class="note">{escape(row.note)}</td></tr>'
        for row in rows
    )
    return f'<table class="latency"><tbody>{lines}</tbody></table>'


def _figure(title: str, words: str, picture: np.ndarray | None) -> str:
    if picture is None:
        shown = '<div class="empty"></div>'
    else:
        data = base64.b64encode(encode_image(picture, "JPEG", quality=90)).decode()
        shown = f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{shown}<figcaption><b>{escape(title)}</b>{escape(words)}</figcaption></figure>"
