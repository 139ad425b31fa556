"""The turns of the chat page: from a question in the box to its answer, and every way that can end. No layout.

Stop and Clear only tell the generator of the answer to end, and `settle`, which the browser calls after it has drawn all that
the generator gave, frees the box and empties the page. With gradio's own `cancels` and Clear button pieces on their way still
arrive: the answer goes on beside a free box, or comes back into an empty chat.
"""

from __future__ import annotations

import contextlib
import html
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from llava_drip.images import ImageError
from serve.backends import Backend, Busy, Failed, decoded
from serve.chat_examples import Examples
from serve.chat_look import Drawings, shown, token_line

MAX_IMAGES = 8  # of one conversation; each may take 75 MB while it is decoded
MAX_TURNS = 1000  # that nobody answers


@dataclass(eq=False)
class Turn:
    """A question under way in one browser tab, from its submission until the page shows all of its answer.

    Attributes:
        stopped: set by Stop and by Clear: say no more.
        cleared: set by Clear: at the end, empty the page.
        answering: whether its answer is being made.
    """

    stopped: threading.Event = field(default_factory=threading.Event)
    cleared: bool = False
    answering: bool = False


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


def before_answer(chat: list[dict]) -> list[dict]:
    """The chat without the answers at its end."""
    last = next((i for i in range(len(chat), 0, -1) if chat[i - 1]["role"] == "user"), 0)
    return chat[:last]


def give_back(chat: list[dict]) -> tuple[list[dict], dict]:
    """Takes the last question out of the chat: the chat without it, and the question as the box has it."""
    first = next((i for i in range(len(chat), 0, -1) if chat[i - 1]["role"] != "user"), 0)
    parts = [part for item in chat[first:] for part in item["content"]]
    text = "\n".join(html.unescape(part["text"]) for part in parts if part["type"] == "text")
    files = [path for part in parts if part["type"] == "file" and os.path.isfile(path := part["file"]["path"])]
    return chat[:first], {"text": text, "files": files}


def without_folders(error: ValueError, paths: list[str]) -> str:
    """An error's message with its files as the user knows them: the name is the user's, the folder gradio's own."""
    text = str(error)
    for path in paths:
        text = text.replace(path, Path(path).name)
    return text


def ready() -> dict:
    """The box takes a question."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)


def empty() -> tuple:
    return [], token_line(None, 0), "", ready()


class Turns:
    """The event handlers, of all tabs. Coroutines where a click must act at once: gradio runs them even when its threads are
    all in use, and one at a time."""

    def __init__(self, backend: Backend, examples: Examples):
        self.backend, self.examples, self.drawings = backend, examples, Drawings(backend)
        self.turns: dict[str, Turn] = {}  # of each tab, by gradio's session hash

    async def begin(self, request: gr.Request) -> None:
        """Begins a turn. Fails, without a word, in the middle of another: Enter was pressed twice."""
        turns = self.turns
        if request.session_hash in turns:
            raise gr.Error("An answer is under way.", print_exception=False)
        # Of a tab that was closed before the answer began nobody ends the turn. (Gradio's unload event would tell, but for
        # it every tab holds a connection open, and a browser has six.)
        idle = [session for session, turn in turns.items() if not turn.answering]
        for session in idle[: max(0, len(turns) - MAX_TURNS + 1)]:
            del turns[session]
        turns[request.session_hash] = Turn()

    def check(self, message: dict, chat: list[dict]) -> None:
        """Shows an error, and leaves the question in the box, where it cannot be taken."""
        if not message["text"].strip() and not message["files"]:
            raise gr.Error("Write a question, or add a picture.", print_exception=False)
        count = len(from_chat(chat)[1]) + len(message["files"])
        if count > MAX_IMAGES:
            problem = f"That makes {count} pictures; a conversation may have {MAX_IMAGES}. Clear it to start anew."
            raise gr.Error(problem, print_exception=False)
        for path in message["files"]:
            try:
                with decoded(path):
                    pass
            except ImageError as error:
                raise gr.Error(without_folders(error, [path]), print_exception=False) from error

    def take(self, message: dict, chat: list[dict]) -> tuple:
        """Moves the question from the box to the chat."""
        asked = [{"role": "user", "content": {"path": path}} for path in message["files"]]
        if text := message["text"].strip():
            asked.append({"role": "user", "content": shown(text)})
        return gr.update(value=None, interactive=False, submit_btn=False, stop_btn=True), [*chat, *asked]

    def choose(self, chosen: gr.SelectData) -> dict:
        """Puts an example into the box."""
        return self.examples.asked(chosen.index)

    def check_again(self, chat: list[dict]) -> None:
        """Shows an error where nothing was asked yet."""
        if not before_answer(chat):
            raise gr.Error("There is no question yet to ask again.", print_exception=False)

    def take_again(self, chat: list[dict]) -> tuple:
        """Takes the last answer out of the chat, to be given again: with another budget, say. The box keeps its text."""
        return gr.update(interactive=False, submit_btn=False, stop_btn=True), before_answer(chat)

    def add_photo(self, message: dict, path: str | None) -> tuple:
        """Puts a photo of the camera into the box, and frees the camera for the next."""
        if path is None:
            return gr.skip(), gr.skip()
        return {"text": message["text"], "files": [*message["files"], path]}, None

    def reply(
        self,
        chat: list[dict],
        own_budget: bool,
        compression: float,
        max_new_tokens: int,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Streams the answer to the last question: the chat, the token line, the pictures and the box.

        own_budget: leave the number of visual tokens to the model; else `compression`.
        """
        yield (
            gr.skip(),
        ) * 4  # after a generator that gave nothing gradio sets all of them to null, which breaks the box
        if (turn := self.turns.get(request.session_hash)) is None:  # forgotten, see begin
            return
        turn.answering = True
        budget = None if own_budget or self.backend.fixed else compression
        paths: list[str] = []
        try:
            messages, paths = from_chat(chat)
            text, line, known, drawn = "", "", None, False
            options = {"max_new_tokens": int(max_new_tokens), "temperature": temperature, "compression": budget}
            with contextlib.closing(self.backend.stream(messages, paths, **options, cancel=turn.stopped)) as events:
                for event in events:
                    if turn.stopped.is_set():  # what is written already may be much more than what is drawn
                        return
                    text += event.text
                    answer = {"role": "assistant", "content": shown(text)}
                    before, line = line, token_line(event.usage, len(paths), known)
                    yield [*chat, answer], line if line != before else gr.skip(), gr.skip(), gr.skip()
                    if not drawn:  # after the first word, which should not wait for it
                        drawn = True
                        try:
                            sheet, known = self.drawings.sheet(paths, budget)
                        except (Busy, Failed):  # no reason to end the answer
                            sheet = "<span class='note'>The segments could not be drawn just now.</span>"
                        line = token_line(event.usage, len(paths), known)
                        yield gr.skip(), line, sheet, gr.skip()
            if not text.strip():
                gr.Info("The model ended its answer before the first word.")
        except ImageError as error:  # an upload that has been deleted, see delete_cache
            problem = f"{without_folders(error, paths)}. Pictures are kept for a day; clear the conversation."
            yield self.refused(problem, chat)
        except Busy as error:
            seconds = max(1, round(error.retry_after))
            problem = (
                f"Many people are asking just now. Please send your question again in {seconds} s; it is in the box."
            )
            yield self.refused(problem, chat)
        except (ValueError, Failed) as error:  # a conversation longer than the model's context, say
            yield self.refused(str(error), chat)
        except GeneratorExit:  # the tab was closed, so that nobody calls settle
            self.turns.pop(request.session_hash, None)
            raise
        finally:
            turn.answering = False

    def refused(self, problem: str, chat: list[dict]) -> tuple:
        """Says why there is no answer. The question goes back into the box."""
        gr.Warning(problem)
        chat, question = give_back(chat)
        return chat, gr.skip(), gr.skip(), gr.update(value=question)

    async def stop(self, request: gr.Request) -> None:
        """Ends the answer, if one is under way."""
        if turn := self.turns.get(request.session_hash):
            turn.stopped.set()

    async def clear(self, request: gr.Request) -> tuple:
        """Empties the page, now or, while an answer is under way, as soon as that has ended."""
        if turn := self.turns.get(request.session_hash):
            turn.cleared = True
            turn.stopped.set()
            return (gr.skip(),) * 4
        return empty()

    async def settle(self, request: gr.Request) -> tuple:
        """Ends a turn: the box takes the next question."""
        turn = self.turns.pop(request.session_hash, None)
        return empty() if turn and turn.cleared else (gr.skip(), gr.skip(), gr.skip(), ready())
