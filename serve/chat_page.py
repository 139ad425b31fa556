"""The chat page: what is where, and which event calls what of serve/chat_turns.py."""

from __future__ import annotations

import html

import gradio as gr

from serve.backends import Backend
from serve.chat_examples import Examples
from serve.chat_look import token_line
from serve.chat_turns import Turns

BUDGETS = (1, 10, 0.5)  # least, most, step of the slider
FIRST_BUDGET = 4

# What gradio gives no argument for. Screen readers read the token line when it changes, and can jump to the regions.
LABELS = """() => {
    const set = (selector, attributes) => {
        for (const element of document.querySelectorAll(selector))
            for (const name in attributes) element.setAttribute(name, attributes[name]);
    };
    document.documentElement.lang = "en";
    set("#tokens", { role: "status", "aria-live": "polite", "aria-label": "Tokens used and time to the first" });
    set("#pictures", { role: "region", "aria-label": "The pictures and their segments" });
    set("#ask textarea", { "aria-label": "Your question" });
    set("#ask .upload-button", { "aria-label": "Add pictures" });
    const inChat = () => {
        set("#chat .examples:not([aria-label])", { role: "group", "aria-label": "Examples" });  // a list without items
        set("#chat .image-container img:not([alt]), #chat .image-container img[alt='']", { alt: "Your picture" });
        set("#chat .image-container button:not([aria-label]):not(.icon-button)", { "aria-label": "Your picture" });
    };
    // While an answer is made the box is off, which would leave the keyboard nowhere: its frame has it then, from where Tab
    // goes to Stop, and the box again afterwards. Not after a tap, for a phone's keyboard would come up.
    const frame = document.querySelector("#ask"), box = frame.querySelector("textarea");
    let typed = false;
    frame.tabIndex = -1;
    box.addEventListener("keydown", () => { typed = true; });
    document.addEventListener("pointerdown", () => { typed = false; });
    new MutationObserver(() => {
        const at = document.activeElement;
        if (!typed || !(at === document.body || frame.contains(at))) return;
        if (box.disabled) frame.focus({ preventScroll: true });
        else box.focus();
    }).observe(box, { attributeFilter: ["disabled"] });
    inChat();
    new MutationObserver(inChat).observe(document.querySelector("#chat"), { subtree: true, childList: true });
}"""


def make_page(backend: Backend) -> gr.Blocks:
    examples = Examples()
    turns = Turns(backend, examples)
    # Old uploads are deleted: every hour those older than a day.
    with gr.Blocks(title=f"{backend.name} · llava_drip", fill_height=True, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {backend.name}\nA picture becomes a few segments, and each segment one token.", elem_id="title")
        with gr.Row(elem_id="sides", equal_height=False):
            with gr.Column(scale=3, min_width=320):
                again = gr.Button("Ask again")  # drawn in the corner of the chat, as the next one
                clear = gr.Button("Clear")
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    placeholder="Add, paste or drop a picture below and ask about it, or try one of these.",
                    examples=examples.cards(),
                    buttons=[again, clear],
                    allow_file_downloads=False,
                    render_markdown=False,
                    layout="bubble",
                )
                ask = gr.MultimodalTextbox(
                    elem_id="ask",
                    label="Your question",
                    show_label=False,
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    placeholder="Ask about the picture",
                    autofocus=True,
                )
            with gr.Column(scale=2, min_width=280):
                own, compression = budget(backend)
                with gr.Accordion("Camera", open=False):
                    camera = gr.Image(
                        elem_id="camera", sources=["webcam"], type="filepath", format="png", label="Camera", height=280
                    )
                with gr.Accordion("Settings", open=False):
                    max_new_tokens = gr.Slider(16, 1024, 256, step=16, label="Longest answer, in tokens")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature: 0 takes the likeliest word")
                tokens = gr.HTML(token_line(None, 0), elem_id="tokens")
                pictures = gr.HTML(elem_id="pictures")

        private = {"api_visibility": "private"}
        at_once = {"queue": False, "show_progress": "hidden", **private}
        everything = [chat, tokens, pictures, ask]

        def turn(start, check, taken_from: list, take) -> None:
            """After the event `start`: check, take the question into the chat, answer, free the box."""
            begun = start(turns.begin, None, None, **at_once)
            # The check has no outputs, for gradio covers those of a failed event with the word "Error"; and it is queued,
            # for gradio shows no errors of other events.
            checked = begun.success(check, taken_from, None, concurrency_limit=None, **private)
            taken = checked.success(take, taken_from, [ask, chat], **at_once)
            answering = taken.success(
                turns.reply,
                [chat, own, compression, max_new_tokens, temperature],
                everything,
                concurrency_limit=None,  # the backend has a queue of its own
                show_progress="minimal",
                show_progress_on=[tokens],
                **private,
            )
            answering.success(turns.settle, None, everything, **at_once)
            for event in (checked, taken, answering):
                event.failure(turns.settle, None, everything, **at_once)

        turn(ask.submit, turns.check, [ask, chat], turns.take)
        chosen = chat.example_select(turns.choose, None, ask, **at_once)
        turn(chosen.success, turns.check, [ask, chat], turns.take)
        turn(again.click, turns.check_again, [chat], turns.take_again)
        ask.stop(turns.stop, None, None, **at_once)
        clear.click(turns.clear, None, everything, **at_once)
        camera.change(turns.add_photo, [ask, camera], [ask, camera], **at_once)
        compression.input(None, None, own, js="() => false", **private)  # who moves the slider wants what it says
        page.load(None, None, None, js=LABELS)
    page.examples = examples  # their folder lives as long as the page
    return page


def budget(backend: Backend) -> tuple[gr.Checkbox, gr.Slider]:
    """The switch and the slider; where the tower takes no budget, hidden behind the reason."""
    free = not backend.fixed
    if not free:
        gr.HTML(f"<span class='note'>No budget to choose: {html.escape(backend.fixed)}</span>", elem_id="no-budget")
    with gr.Group(visible=free):
        own = gr.Checkbox(True, label="Let the model choose how many tokens a picture gets")
        slider = gr.Slider(
            *BUDGETS[:2],
            FIRST_BUDGET,
            step=BUDGETS[2],
            label="Budget: patches per token",
            info=f"1 is unlimited: all {backend.patches} patches. From the next answer on, for all pictures.",
            elem_id="budget",
        )
    return own, slider
