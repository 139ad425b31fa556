"""How the chat page looks: its style, and the HTML of what stands beside the chat."""

from __future__ import annotations

import base64
import functools
import html
import io

import gradio as gr
from PIL import Image

from llava_drip.draw.overlay import draw_segments
from llava_drip.engine import Usage
from serve.backends import Backend, Seen, decoded

DRAWN_PIXELS = 672  # longer side of a drawn picture
NOTHING_YET = "Add a picture and ask about it: here you will see how few tokens it took."

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.35rem; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#chat { height: max(24rem, calc(100dvh - 14rem)) !important; }
#chat .image-container img { max-height: 12rem !important; width: auto !important; }
#chat .message-buttons-right { display: none; }  /* has a button that uploads the picture to a public site */
#chat .icon-button-wrapper:has(> .custom-button) > :not(.custom-button) { display: none; }  /* gradio's Clear: see chat_page */
#chat .placeholder-content { height: auto; min-height: 100%; justify-content: center; gap: 1rem; }
#chat .examples { margin: 0; }
#chat .placeholder { flex: none; height: auto; padding: 0 1rem; text-align: center; }
#chat .example { border: 1px solid var(--border-color-primary); background: var(--background-fill-primary); }
#chat .example-content { flex-direction: row; align-items: center; gap: .75rem; }
#chat .example-image-container { width: 4rem; height: 4rem; flex: none; margin: 0; }
#chat .example-image { width: 100%; height: 100%; object-fit: cover; }
#chat .example-text-content { margin: 0; text-align: start; }
#tokens, #pictures { padding-inline: .25rem; }
#tokens { font-variant-numeric: tabular-nums; }
#tokens b { font-size: 1.5rem; font-weight: 650; }
#tokens .bar { height: .4rem; border-radius: .2rem; background: var(--border-color-primary); margin: .35rem 0; }
#tokens .bar span { display: block; height: 100%; border-radius: .2rem; background: var(--color-accent); }
#pictures .sheet { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
#pictures figure { margin: 0; }
#pictures img { width: 100%; max-width: 28rem; border-radius: .4rem; display: block; }
#pictures figcaption { font-size: .875rem; padding-top: .25rem; font-variant-numeric: tabular-nums; }
:is(button, input, textarea, [tabindex]):focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
/* On a phone one column: what an answer took comes right after it, the settings last. Tab keeps to the same order. */
@media (max-width: 760px) {
  #sides { flex-direction: column; flex-wrap: nowrap; }
  #sides > .column { display: contents; }
  #sides > .column > * { width: 100%; order: 5; }
  #sides > .column > #chat { order: 1; height: max(20rem, calc(100dvh - 16rem)) !important; }
  #sides > .column > #tokens { order: 2; }
  #sides > .column > :is(#ask, :has(#ask)) { order: 3; }
  #sides > .column > #pictures { order: 4; }
}
"""


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: the usual themes fetch theirs from the internet. Texts have a contrast of 4.5 to 1 at
    least (WCAG 2.1 AA), which Soft's grey and teal ones do not."""
    soft = gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    subdued, title, line = (
        ("*neutral_600", "*neutral_300"),
        ("*neutral_800", "*neutral_100"),
        ("*neutral_300", "*neutral_600"),
    )
    pairs = {"body_text_color_subdued": subdued, "block_info_text_color": subdued, "input_placeholder_color": subdued}
    pairs |= {"block_title_text_color": title, "block_title_background_fill": ("none", "none")}
    pairs |= {"block_border_color": line, "border_color_primary": line, "block_border_width": ("1px", "1px")}
    pairs |= {"input_border_color": line, "input_border_width": ("1px", "1px")}
    sides = {f"{name}{end}": pair[i] for name, pair in pairs.items() for i, end in enumerate(("", "_dark"))}
    return soft.set(**sides)


def shown(text: str) -> str:
    """Text for gradio's chat, escaped: a "<b>" or an "<img>" that was written is to be read, not obeyed."""
    return html.escape(text)


def token_line(usage: Usage | None, images: int, visual_tokens: int | None = None) -> str:
    """The line beside an answer, as HTML: N of M tokens used, first token after ... ms.

    images: of the conversation. visual_tokens: of them, where the usage does not know it yet.
    """
    if usage is None:
        return f"<span class='note'>{html.escape(NOTHING_YET)}</span>"
    first = "…" if usage.first_token_ms is None else f"{usage.first_token_ms:.0f} ms"
    waited = f", {usage.waited_ms / 1000:.1f} s in the queue before" if usage.waited_ms >= 500 else ""
    if not images:
        return f"<span class='note'>No picture in this conversation; first token after {first}{waited}</span>"
    count = usage.visual_tokens or visual_tokens
    line = f"<b>{count or '…'}</b> of {usage.patches} tokens used, first token after {first}{waited}"
    if not count:
        return f"<div>{line}</div>"
    return (
        f"<div>{line}</div>"
        f"<div class='bar' aria-hidden='true'><span style='width:{100 * count / usage.patches:.1f}%'></span></div>"
        f"<div class='note'>{usage.patches / count:.1f} patches per token; below, one colour is one token</div>"
    )


def figure(picture: Image.Image, caption: str) -> str:
    """A picture and its caption as HTML that needs no second request."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    alt, caption = html.escape(f"The picture with its segments: {caption}"), html.escape(caption)
    return f"<figure><img alt='{alt}' src='data:image/webp;base64,{data}'><figcaption>{caption}</figcaption></figure>"


class Drawings:
    """Pictures with their segments. The last ones are kept: a conversation shows its pictures again at every turn."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.drawn = functools.lru_cache(maxsize=128)(self._draw)

    def sheet(self, paths: list[str], compression: float | None) -> tuple[str, int]:
        """All pictures of a conversation as HTML, and how many tokens they take. Raises as the backend does."""
        figures, counts = zip(*(self.drawn(path, compression) for path in paths)) if paths else ((), ())
        return f"<div class='sheet'>{''.join(figures)}</div>", sum(counts)

    def _seen(self, path: str, compression: float | None) -> Seen:
        with decoded(path) as image:
            return self.backend.see(image, compression)

    def _draw(self, path: str, compression: float | None) -> tuple[str, int]:
        seen = self._seen(path, compression)
        picture = seen.view
        picture.thumbnail((DRAWN_PIXELS, DRAWN_PIXELS))
        if seen.owners is not None:
            picture = draw_segments(picture, seen.owners, seen.grid, fill="tint")
        return figure(picture, f"{seen.count} of {seen.grid[0] * seen.grid[1]} tokens"), seen.count
