"""Questions to start with, about pictures that are rendered when the page starts."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from PIL import Image

from llava_drip.world import render, scene_at

# Number of the scene (of the world's test split), question.
QUESTIONS = (
    (0, "Describe all shapes."),
    (3, "What colour is the shape in the northwest?"),
    (7, "How many shapes are there?"),
    (4, "Is the shape in the southwest plain or striped?"),
)
SIDE = 256  # pixels


class Examples:
    """The pictures in a folder of their own, which lives as long as this object."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="llava_drip_examples_")
        self.questions: list[tuple[Path, str]] = []
        for number, (scene, text) in enumerate(QUESTIONS, 1):
            path = Path(self._folder.name) / f"example_{number}.png"
            picture = Image.fromarray(render(scene_at(0, "test", scene))[0])
            picture.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)
            self.questions.append((path, text))

    def cards(self) -> list[dict]:
        """As gr.Chatbot shows them. The pictures are in the page itself: gradio's copies of files are deleted after a day."""
        cards = []
        for number, (path, text) in enumerate(self.questions, 1):
            url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            file = {"url": url, "mime_type": "image/png", "orig_name": f"Picture of example {number}"}
            cards.append({"text": text, "files": [file]})
        return cards

    def asked(self, number: int) -> dict:
        """Example `number`, from 0, as the question box has it."""
        path, text = self.questions[number]
        return {"text": text, "files": [str(path)]}
