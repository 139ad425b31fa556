"""Labels lie on what the assistant says and on nothing else, whatever the template and the tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from llava_drip.assistant import LlavaDripProcessor
from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.conversation import TemplateFailure, reads_parts, write_chat
from llava_drip.instruct.data import encode_conversation
from llava_drip.instruct.templates import BRIEF, PLAIN, VICUNA_V1, render, resolve_template

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Only the last answer is shown with its thoughts, as some reasoning models' templates have it.
REWRITES = (
    "{%- for message in messages -%}{{ message.role + ': ' }}"
    "{%- if message.role == 'assistant' and loop.last -%}{{ '<think></think>' }}{%- endif -%}"
    "{{ message.content[-1].text + eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "What color is the circle? The circle is red.",
    "USER: Describe. ASSISTANT: two squares, one blue.",
    "system user assistant\n",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Words begin with their space, as in T5's and newer LLaMA conversions of sentencepiece."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        CORPUS * 3,
        trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


def llama_legacy() -> Tokenizer:
    """LLaMA's and Vicuna's: a normalizer turns spaces into ▁ and puts one in front, unknown letters fall back to bytes."""
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")} - {"▁"})
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("▁", "c"), ("i", "r"), ("▁", "r"), ("▁r", "e"), ("▁re", "d")]
    words = [*letters, *("".join(pair) for pair in merges)]
    ids = {token: i for i, token in enumerate([*vocabulary, *words])}
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, metaspace, llama_legacy], ids=lambda make: make.__name__)
def processor(request) -> LlavaDripProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=request.param(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:],
    )
    return LlavaDripProcessor(CLIPImageProcessor(), tokenizer)


def turn(role: str, text: str, images: int = 0) -> dict:
    return {"role": role, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


TALK = [
    turn("user", "What color is the circle?", images=1),
    turn("assistant", "The circle is red."),
    turn("user", "Describe."),
    turn("assistant", "two squares, one blue."),
]
ENDS = {"vicuna_v1": (VICUNA_V1, "</s>"), "brief": (BRIEF, "</s>"), "chatml": (CHATML, "<|im_end|>\n")}


def runs(labels: list[int]) -> list[list[int]]:
    """The labelled stretches."""
    result, current = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            current.append(label)
        elif current:
            result.append(current)
            current = []
    return result


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_labels_are_the_answers_and_their_end_marks(processor, name, system):
    template, end = ENDS[name]
    messages = [turn("system", "Be brief."), *TALK] if system else TALK
    ids, labels = encode_conversation(processor, messages, template)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
    said = [words(processor.decode(run)) for run in runs(labels)]
    assert said == [words(f"The circle is red.{end}"), words(f"two squares, one blue.{end}")]
    assert ids.count(processor.image_token_id) == 1


def test_alignment_learns_the_caption_alone(processor):
    ids, labels = encode_conversation(processor, TALK[:2], PLAIN)
    assert [words(processor.decode(run)) for run in runs(labels)] == ["The circle is red."]
    text = render(processor.tokenizer, TALK[:2], PLAIN).text
    assert text == "<s><image>The circle is red.\n" and "What color" not in processor.decode(ids)


@pytest.mark.parametrize("name", ENDS)
def test_the_prompt_is_tokenized_as_it_will_be_in_inference(processor, name):
    """What comes before the first answer is what generate() will be given."""
    template, _ = ENDS[name]
    ids, labels = encode_conversation(processor, TALK[:2], template)
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    prompt = processor.tokenizer.apply_chat_template(
        TALK[:1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ids[:first] == processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_template_that_rewrites_earlier_turns_is_refused(processor):
    render(processor.tokenizer, TALK[:1], REWRITES)
    with pytest.raises(ValueError, match=r"rewrites earlier turns \(at turn 1\)"):
        encode_conversation(processor, TALK, REWRITES)


def test_versions(processor):
    assert resolve_template("plain", processor.tokenizer) == PLAIN
    assert resolve_template("vicuna_v1", processor.tokenizer) == VICUNA_V1
    assert resolve_template("v1", processor.tokenizer) == VICUNA_V1, "LLaVA's name"
    assert resolve_template(None, processor.tokenizer) == VICUNA_V1, "the tokenizer has none of its own"
    with pytest.raises(ValueError, match=r"--version must be one of \['plain', 'v1', 'vicuna_v1'\], got 'v9'"):
        resolve_template("v9", processor.tokenizer)


def test_vicunas_format(processor):
    text = render(processor.tokenizer, TALK, VICUNA_V1).text
    assert text.startswith("<s>A chat between a curious user and an artificial intelligence assistant.")
    assert text.endswith(
        " USER: <image>\nWhat color is the circle? ASSISTANT: The circle is red.</s>"
        " USER: Describe. ASSISTANT: two squares, one blue.</s>"
    )


LLAMA3_LIKE = (
    "{{- bos_token }}{%- for m in messages -%}{{ '[' + m['role'] + ']\n' }}{{ m['content'] | trim }}{{ eos_token }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '[assistant]\n' }}{%- endif -%}"
)
QWEN_LIKE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SEEN = {
    LLAMA3_LIKE: "<s>[user]\n<image>\nWhat?</s>[assistant]\nA cat.</s>",
    QWEN_LIKE: "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n",
}


@pytest.mark.parametrize("template", SEEN)
def test_a_text_models_template_gets_strings(template, tmp_path):
    """In training and in the engine alike, which gives a list of parts to both."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    rendered = render(tokenizer, turns, template)
    assert rendered.text == SEEN[template] and not reads_parts(tokenizer, template)
    ((start, end),) = rendered.spans
    assert rendered.text[start:end].startswith("A cat.") and end == len(rendered.text)
    prompt = write_chat(tokenizer, turns[:1], template, add_generation_prompt=True)
    assert prompt == rendered.text[:start]


def test_templates_that_read_parts_get_them():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    assert all(reads_parts(tokenizer, template) for template in (PLAIN, VICUNA_V1, BRIEF, CHATML, REWRITES))


def test_whatever_a_template_raises_is_one_line():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    turns = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    for template in ("{{ messages[0].content + 1 }}", "{{ messages | nonsense }}", "{{ nothing.there }}"):
        with pytest.raises(TemplateFailure, match=r"^the chat template cannot write this conversation \(\w+: .*\)$"):
            write_chat(tokenizer, turns, template)
