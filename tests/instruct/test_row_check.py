"""Bounds on rows are bounds, and what exceeds them is found."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from llava_drip.assistant.build import load_assistant
from llava_drip.instruct.data import Collator, ConversationDataset
from llava_drip.instruct.row_check import TokenBound, check_rows, most_visual_tokens, resolve_max_length
from llava_drip.instruct.templates import VICUNA_V1

from .test_templates import byte_level, llama_legacy, metaspace

PIECES = [
    "a",
    " ",
    "the circle",
    "é",
    "漢字",
    "🙂",
    "\ufdfa",
    "<s>",
    "\n",
    "▁",
    "\u0301",
    "</s>",
    " <s> ",
    "\x00",
    ",.",
]


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("make", [byte_level, metaspace, llama_legacy])
def test_a_text_never_has_more_tokens_than_the_bound(make, compatible):
    backend = make()
    if compatible:  # one character may become 18
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), *([backend.normalizer] if backend.normalizer else [])]
        )
    elif make is byte_level:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    bound, draw = TokenBound(tokenizer), random.Random(0)
    texts = ["", *PIECES, *(piece * 30 for piece in PIECES)]
    texts += ["".join(draw.choices(PIECES, k=draw.randrange(1, 40))) for _ in range(300)]
    for text in texts:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= bound(text), text


def test_the_bound_is_of_use():
    text = "<s>" + 20 * " What color is the circle? The circle is red."
    for make, most in ((byte_level, 1.01), (llama_legacy, 1.01), (metaspace, 2.01)):
        assert TokenBound(PreTrainedTokenizerFast(tokenizer_object=make()))(text) <= most * len(text)


def test_visual_tokens_of_a_picture_at_most(tiny_checkpoint):
    model, _ = load_assistant(tiny_checkpoint)
    pixels = torch.randn(4, 3, 64, 64)
    for compression, most in ((None, 64), (5.0, 13), (1.0, 64), (64.0, 1)):
        model.set_compression(compression)
        assert most_visual_tokens(model) == most
        lengths = model.encode_images(pixels).lengths
        assert (lengths == most).all() if compression else (lengths <= most).all()


def test_positions():
    assert resolve_max_length(None, SimpleNamespace(max_position_embeddings=4096)) == 2048
    assert resolve_max_length(None, SimpleNamespace(max_position_embeddings=1024)) == 1024
    assert resolve_max_length(None, SimpleNamespace()) == 2048
    assert resolve_max_length(4096, SimpleNamespace(max_position_embeddings=4096)) == 4096
    assert resolve_max_length(9999, SimpleNamespace()) == 9999
    with pytest.raises(ValueError, match="--model_max_length 1025: the language model has 1024 positions"):
        resolve_max_length(1025, SimpleNamespace(max_position_embeddings=1024))


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "a.png")
    answer = {"from": "gpt", "value": "It is a cat. " * 60}
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, answer]}
    short = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}
    return [short, row, short, row, short]


def test_rows_that_are_cut_are_counted_and_fit(rows, tmp_path, tiny_checkpoint):
    """With as many visual tokens as there can be, too."""
    model, processor = load_assistant(tiny_checkpoint)
    model.set_compression(1.0)
    dataset = ConversationDataset(rows, processor, VICUNA_V1, tmp_path, 400, most_visual_tokens(model))
    assert check_rows(dataset, "chat.json") == 2
    batch = Collator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(len(dataset))])
    assert model.embed(**batch)[0].shape[1] == 400
    roomy = ConversationDataset(rows, processor, VICUNA_V1, tmp_path, 2048, 64)
    assert check_rows(roomy, "chat.json") == 0


def test_a_template_that_rewrites_what_one_row_says(rows, tmp_path, tiny_checkpoint):
    """As templates of reasoning models take thoughts out of earlier turns: nothing tells but that row."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    template = (
        "{%- for m in messages -%}{{ m.role + ':' }}{%- for part in m.content -%}"
        "{{ '<image>' if part.type == 'image' else part.text if loop.last and messages[-1] == m"
        " else part.text.split('END')[-1] }}{%- endfor -%}{{ eos_token }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"
    )
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Hm. END So."}]
    thinking = {"id": "t", "conversations": [*talk, *rows[0]["conversations"]]}
    many = [rows[0]] * 80
    assert check_rows(ConversationDataset(many, processor, template, tmp_path, 2048), "chat.json") == 0
    with pytest.raises(ValueError, match=r"chat.json: row 80 \(id 't'\): .*rewrites earlier turns"):
        check_rows(ConversationDataset([*many, thinking], processor, template, tmp_path, 2048), "chat.json")


def test_a_template_that_leaves_an_image_out(rows, tmp_path, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    template = VICUNA_V1.replace("'<image>\n'", "''")
    assert template != VICUNA_V1
    with pytest.raises(ValueError, match="chat.json: row 1: the chat template writes 0 of 1 <image>"):
        check_rows(ConversationDataset(rows, processor, template, tmp_path, 2048), "chat.json")


def test_a_template_that_refuses_a_row(rows, tmp_path, tiny_checkpoint):
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    refusing = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}" + VICUNA_V1
    rows = [rows[0], {"conversations": [{"from": "system", "value": "Be brief."}, *rows[0]["conversations"]]}]
    with pytest.raises(ValueError, match="chat.json: row 1: the chat template cannot .*no system role.*--version"):
        check_rows(ConversationDataset(rows, processor, refusing, tmp_path, 2048), "chat.json")
