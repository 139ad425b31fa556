"""python -m serve.gradio_app --model DIR [--host 127.0.0.1] [--port 7860]

A chat in the browser: upload pictures, ask, see the answer stream in, and beside it how the tower cut each picture into
segments, how many tokens that took, and how soon the first word came. Works without internet and reports to nobody.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from PIL import Image

from llava_drip import cli
from llava_drip.draw.overlay import draw_segments
from llava_drip.engine import Engine, Usage
from llava_drip.images import MAX_BYTES, ImageError, load_image

MAX_IMAGES = 8  # of one conversation; each may take 75 MB while it is decoded
MAX_TURNS = 1000  # that nobody answers
DRAWN_PIXELS = 672  # longer side of a drawn picture
NOTHING_YET = "Upload a picture and ask about it."

CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.35rem; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#chat { height: max(22rem, calc(100dvh - 16rem)) !important; }
#chat .image-container img { max-height: 12rem !important; width: auto !important; }
#chat .message-buttons-right { display: none; }  /* has a button that uploads the picture to a public site */
#chat .icon-button-wrapper:has(> .custom-button) > :not(.custom-button) { display: none; }  /* gradio's Clear: see make_page */
#tokens, #pictures { padding-inline: .25rem; }
#tokens { font-variant-numeric: tabular-nums; }
#tokens b { font-size: 1.5rem; font-weight: 650; }
#tokens .note, #pictures figcaption { color: var(--body-text-color-subdued); }
#tokens .bar { height: .4rem; border-radius: .2rem; background: var(--border-color-primary); margin: .35rem 0; }
#tokens .bar span { display: block; height: 100%; border-radius: .2rem; background: var(--color-accent); }
#pictures .sheet { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
#pictures figure { margin: 0; }
#pictures img { width: 100%; max-width: 28rem; border-radius: .4rem; display: block; }
#pictures figcaption { font-size: .875rem; padding-top: .25rem; font-variant-numeric: tabular-nums; }
@media (max-width: 760px) {
  #sides { flex-direction: column; }
  #sides > * { min-width: 0 !important; width: 100%; }
  #chat { height: max(18rem, calc(100dvh - 16rem)) !important; }
}
"""


@dataclass(eq=False)
class Turn:
    """A question under way in one browser tab, from its submission until the page shows all of its answer.

    Attributes:
        stopped: set by Stop and by Clear: say no more.
        cleared: set by Clear: at the end, empty the page.
    """

    stopped: threading.Event = field(default_factory=threading.Event)
    cleared: bool = False


def from_chat(chat: list[dict]) -> tuple[list[dict], list[str]]:
    """What gradio's chat shows → the engine's messages, and the paths of the pictures in the order of their image parts.

    The chat is the conversation's only memory: what the reader sees is what the model is told. Texts of one side that follow
    each other, as when an answer was stopped before its first word, are lines of one text.
    """
    messages, paths = [], []
    for item in chat:
        if not messages or messages[-1]["role"] != item["role"]:
            messages.append({"role": item["role"], "content": []})
        for part in item["content"]:
            if part["type"] == "file":
                paths.append(part["file"]["path"])
                messages[-1]["content"].append({"type": "image"})
            elif part["type"] == "text":
                text, content = html.unescape(part["text"]), messages[-1]["content"]
                if content and content[-1]["type"] == "text":
                    text = f"{content.pop()['text']}\n{text}"
                content.append({"type": "text", "text": text})
            else:
                raise ValueError(f"a part of type {part['type']!r} cannot be asked about")
    return messages, paths


def shown(text: str) -> str:
    """Text for gradio's chat, escaped: a "<b>" or an "<img>" that was written is to be read, not obeyed."""
    return html.escape(text)


def wait_line(before: int) -> str:
    """The line beside a question that has to wait, as HTML."""
    return f"<span class='note'>Waiting for {before} earlier answer{'s' if before > 1 else ''}…</span>"


def token_line(usage: Usage | None, images: int) -> str:
    """The line beside an answer, as HTML: N of M visual tokens, first token after ... ms."""
    if usage is None:
        return f"<span class='note'>{html.escape(NOTHING_YET)}</span>"
    first = "…" if usage.first_token_ms is None else f"{usage.first_token_ms:.0f} ms"
    if not images:
        return f"<span class='note'>No picture in this conversation; first token after {first}</span>"
    share = 100 * usage.visual_tokens / usage.patches
    return (
        f"<div><b>{usage.visual_tokens}</b> of {usage.patches} visual tokens, first token after {first}</div>"
        f"<div class='bar'><span style='width:{share:.1f}%'></span></div>"
        f"<div class='note'>{usage.patches / usage.visual_tokens:.1f} patches per token; below, one colour is one token</div>"
    )


def without_folders(error: ValueError, paths: list[str]) -> str:
    """An error's message with its files as the user knows them: the name is the user's, the folder gradio's own."""
    text = str(error)
    for path in paths:
        text = text.replace(path, Path(path).name)
    return text


def figure(picture: Image.Image, caption: str) -> str:
    """A picture and its caption as HTML that needs no second request."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f"<figure><img alt='{caption}' src='data:image/webp;base64,{data}'><figcaption>{caption}</figcaption></figure>"
    )


def make_page(engine: Engine, name: str) -> gr.Blocks:
    """The chat page. name: what to call the model.

    Stop and Clear only tell the generator of the answer to end, and `settle`, which the browser calls after it has
    drawn all that the generator gave, frees the box and empties the page. With gradio's own `cancels` and Clear button
    pieces on their way still arrive: the answer goes on beside a free box, or comes back into an empty chat.
    """
    turns: dict[str, Turn] = {}  # of each tab, by gradio's session hash
    line: list[Turn] = []  # those that wait for the engine, behind the one that has it

    @functools.lru_cache(maxsize=64)  # a conversation shows its pictures again at every turn
    def drawn(path: str) -> str:
        image = engine.view(load_image(path))
        count, segments, grid_size = engine.segments(image)
        image.thumbnail((DRAWN_PIXELS, DRAWN_PIXELS))
        picture = image if segments is None else draw_segments(image, segments, grid_size, fill="tint")
        return figure(picture, f"{count} of {engine.patches} tokens")

    async def begin(request: gr.Request) -> None:
        """Begins a turn. Fails, without a word, in the middle of another: Enter was pressed twice."""
        if request.session_hash in turns:
            raise gr.Error("An answer is under way.", print_exception=False)
        # Of a tab that was closed before the answer began nobody ends the turn. (Gradio's unload event would tell, but for
        # it every tab holds a connection open, and a browser has six.)
        idle = [session for session, turn in turns.items() if turn not in line]
        for session in idle[: max(0, len(turns) - MAX_TURNS + 1)]:
            del turns[session]
        turns[request.session_hash] = Turn()

    def check(message: dict, chat: list[dict]) -> None:
        """Shows an error, and leaves the question in the box, where it cannot be taken."""
        if not message["text"].strip() and not message["files"]:
            raise gr.Error("Write a question, or add a picture.", print_exception=False)
        count = len(from_chat(chat)[1]) + len(message["files"])
        if count > MAX_IMAGES:
            problem = f"That makes {count} pictures; a conversation may have {MAX_IMAGES}. Clear it to start anew."
            raise gr.Error(problem, print_exception=False)
        for path in message["files"]:
            try:
                load_image(path)
            except ImageError as error:
                raise gr.Error(without_folders(error, [path]), print_exception=False) from error

    def take(message: dict, chat: list[dict]) -> tuple:
        """Moves the question from the box to the chat."""
        asked = [{"role": "user", "content": {"path": path}} for path in message["files"]]
        if text := message["text"].strip():
            asked.append({"role": "user", "content": shown(text)})
        return gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True), [*chat, *asked]

    def give_back(chat: list[dict]) -> tuple[list[dict], dict]:
        """Takes the last question out of the chat: the chat without it, and the question as the box has it."""
        first = next((i for i in range(len(chat), 0, -1) if chat[i - 1]["role"] != "user"), 0)
        parts = [part for item in chat[first:] for part in item["content"]]
        text = "\n".join(html.unescape(part["text"]) for part in parts if part["type"] == "text")
        files = [path for part in parts if part["type"] == "file" and os.path.isfile(path := part["file"]["path"])]
        return chat[:first], {"text": text, "files": files}

    def reply(chat: list[dict], max_new_tokens: int, temperature: float, request: gr.Request) -> Iterator[tuple]:
        """Streams the answer to the last question: the chat, the token line, the pictures and the box."""
        if (turn := turns.get(request.session_hash)) is None:  # forgotten, see begin
            return
        paths: list[str] = []
        line.append(turn)
        try:
            while line[0] is not turn and not turn.stopped.wait(0.1):
                yield gr.skip(), wait_line(line.index(turn)), gr.skip(), gr.skip()
            if turn.stopped.is_set():
                yield gr.skip(), "", gr.skip(), gr.skip()  # waits no more
                return
            messages, paths = from_chat(chat)
            images = [load_image(path) for path in paths]
            sheet = "<div class='sheet'>" + "".join(map(drawn, paths)) + "</div>"
            text = ""
            options = {"max_new_tokens": int(max_new_tokens), "temperature": temperature, "cancel": turn.stopped}
            with contextlib.closing(engine.stream(messages, images, **options)) as events:
                for event in events:
                    if turn.stopped.is_set():  # what is written already may be much more than what is drawn
                        return
                    text += event.text
                    answer = {"role": "assistant", "content": shown(text)}
                    yield [*chat, answer], token_line(event.usage, len(paths)), sheet, gr.skip()
                    sheet = gr.skip()
            if not text.strip():
                gr.Info("The model ended its answer before the first word.")
        except ImageError as error:  # an upload that has been deleted, see delete_cache
            gr.Warning(f"{without_folders(error, paths)}. Pictures are kept for a day; clear the conversation.")
            chat, question = give_back(chat)
            yield chat, gr.skip(), gr.skip(), gr.update(value=question)
        except ValueError as error:  # a conversation longer than the model's context
            gr.Warning(str(error))
            chat, question = give_back(chat)
            yield chat, gr.skip(), gr.skip(), gr.update(value=question)
        except GeneratorExit:  # the tab was closed, so that nobody calls settle
            turns.pop(request.session_hash, None)
            raise
        finally:
            line.remove(turn)

    # Coroutines, for gradio runs them one at a time, and at once even when its threads are all in use.
    async def stop(request: gr.Request) -> None:
        """Ends the answer, if one is under way."""
        if turn := turns.get(request.session_hash):
            turn.stopped.set()

    async def clear(request: gr.Request) -> tuple:
        """Empties the page, now or, while an answer is under way, as soon as that has ended."""
        if turn := turns.get(request.session_hash):
            turn.cleared = True
            turn.stopped.set()
            return (gr.skip(),) * 4
        return empty()

    async def settle(request: gr.Request) -> tuple:
        """Ends a turn: the box takes the next question."""
        turn = turns.pop(request.session_hash, None)
        return empty() if turn and turn.cleared else (gr.skip(), gr.skip(), gr.skip(), ready())

    def empty() -> tuple:
        return [], token_line(None, 0), "", ready()

    def ready() -> dict:
        return gr.update(interactive=True, submit_btn=True, stop_btn=False)

    # Old uploads are deleted: every hour those older than a day.
    with gr.Blocks(title=f"{name} · llava_drip", fill_height=True, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {name}\nA picture becomes a few segments, and each segment one token.", elem_id="title")
        with gr.Row(elem_id="sides", equal_height=False):
            with gr.Column(scale=3, min_width=320):
                clear_button = gr.Button("Clear")  # drawn in the corner of the chat
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    placeholder="Add a picture with the clip below, and ask about it.",
                    buttons=[clear_button],
                    allow_file_downloads=False,
                    render_markdown=False,
                    layout="bubble",
                )
                ask = gr.MultimodalTextbox(
                    elem_id="ask",
                    show_label=False,
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    placeholder="Ask about the picture",
                    autofocus=True,
                )
                with gr.Accordion("Settings", open=False):
                    max_new_tokens = gr.Slider(16, 1024, 256, step=16, label="Longest answer, in tokens")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature: 0 takes the likeliest word")
            with gr.Column(scale=2, min_width=280):
                tokens = gr.HTML(token_line(None, 0), elem_id="tokens")
                pictures = gr.HTML(elem_id="pictures")

        private = {"api_visibility": "private"}
        at_once = {"queue": False, "show_progress": "hidden", **private}
        everything = [chat, tokens, pictures, ask]
        begun = ask.submit(begin, None, None, **at_once)
        # The check has no outputs, for gradio covers those of a failed event with the word "Error"; and it is queued,
        # for gradio shows no errors of other events.
        checked = begun.success(check, [ask, chat], None, concurrency_limit=None, **private)
        taken = checked.success(take, [ask, chat], [ask, chat], **at_once)
        answering = taken.success(
            reply,
            [chat, max_new_tokens, temperature],
            everything,
            concurrency_limit=None,  # the engine answers one at a time: they wait in `line`, where Stop reaches them
            show_progress="minimal",
            show_progress_on=[tokens],
            **private,
        )
        answering.success(settle, None, everything, **at_once)
        for event in (checked, taken, answering):
            event.failure(settle, None, everything, **at_once)
        ask.stop(stop, None, None, **at_once)
        clear_button.click(clear, None, everything, **at_once)
    return page


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: the usual themes fetch theirs from the internet."""
    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def main() -> None:
    parser = cli.ArgumentParser(prog="gradio_app", description="Chat with an assistant in the browser.")
    parser.add_argument("--model", required=True, type=Path, help="folder of an assistant (config.json, *.safetensors)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too, without a password")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default bfloat16 on cuda, else float32")
    parser.add_argument(
        "--compression",
        type=float,
        help="patches per visual token; default: as the checkpoint says, else each image decides",
    )
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        parser.error(f"--port {args.port}: must be 1 to 65535")

    engine = Engine.load(args.model, args.device, args.dtype, args.compression)
    page = make_page(engine, args.model.resolve().name)
    _, url, _ = page.launch(
        server_name=args.host,
        server_port=args.port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_BYTES,
        theme=theme(),
        css=CSS,
    )
    print(f"chat at {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.run(main, "gradio_app")
