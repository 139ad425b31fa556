"""generate(): a batch answers as each row does alone, and what comes back is prompt and answer."""

from __future__ import annotations

import pytest
import torch
from transformers import TextStreamer

NEW = 8


def answers(model, processor, text, images, **kwargs) -> list[list[int]]:
    inputs = processor(text=text, images=images)
    out = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **kwargs)
    prompts = inputs["input_ids"].repeat_interleave(kwargs.get("num_return_sequences", 1), 0)
    assert torch.equal(out[:, : prompts.shape[1]], prompts)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_answers_as_each_row_alone(assistant, rows, beams):
    model, processor = assistant
    text, images = rows
    inputs = processor(text=text, images=images)
    assert (inputs["attention_mask"][:, 0] == 0).sum() >= 2, "rows should differ in length, or this shows nothing"
    assert len(set(model.encode_images(inputs["pixel_values"]).lengths.tolist())) > 1, "so should the images' tokens"
    together = answers(model, processor, text, images, num_beams=beams, do_sample=False)
    alone = [answers(model, processor, [t], [i], num_beams=beams, do_sample=False)[0] for t, i in zip(text, images)]
    assert together == alone
    assert len({tuple(row) for row in together}) > 1, "all rows answer the same: the prompts make no difference"
    assert all(len(row) == NEW for row in together)


def test_equally_long_prompts_whose_pictures_differ_in_tokens(assistant, rows):
    """Nothing is padded before the pictures' tokens go in; then the shorter rows must be padded on the left."""
    model, processor = assistant
    text, images = [rows[0][0]] * 3, [rows[1][0], rows[1][3], rows[1][2][:1]]
    inputs = processor(text=text, images=images)
    assert inputs["attention_mask"].all()
    assert len(set(model.encode_images(inputs["pixel_values"]).lengths.tolist())) > 1
    alone = [answers(model, processor, [t], [i], do_sample=False)[0] for t, i in zip(text, images)]
    assert answers(model, processor, text, images, do_sample=False) == alone


def test_logits_of_a_padded_batch_equal_those_of_single_rows(assistant, rows):
    model, processor = assistant
    text, images = rows
    inputs = processor(text=text, images=images)
    with torch.no_grad():
        together = model(**inputs).logits
        for row, (t, i) in enumerate(zip(text, images)):
            alone = model(**processor(text=[t], images=[i])).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_the_pictures_matter(assistant, rows):
    model, processor = assistant
    (one, *_), ((picture, *_), _, (other, _), _) = rows
    a, b = (model(**processor(text=[one], images=[[p]])).logits[0, -1] for p in (picture, other))
    assert (a - b).abs().max() > 1e-3


def test_several_sampled_answers_a_row(assistant, rows):
    model, processor = assistant
    text, images = rows
    torch.manual_seed(0)
    out = answers(model, processor, text, images, do_sample=True, temperature=2.0, num_return_sequences=3)
    assert len(out) == 12
    assert len({tuple(row) for row in out[:3]}) > 1, "samples of one row are all the same"


def test_beams_with_several_sequences_and_an_output_object(assistant, rows):
    model, processor = assistant
    inputs = processor(text=rows[0], images=rows[1])
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        num_beams=2,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"].repeat_interleave(2, 0))
    assert out.sequences_scores.shape == (8,)


def test_streamer_sees_the_answer(assistant, rows, capsys):
    model, processor = assistant
    inputs = processor(text=rows[0][:1], images=rows[1][:1])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=False)
    out = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, streamer=streamer)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == answer.strip() != ""


def test_the_end_mark_ends_an_answer(assistant, rows):
    model, processor = assistant
    text, images = rows
    inputs = processor(text=text, images=images)
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, length:]
    stop = int(free[0, 2])  # what the first row says third, now as its end mark
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop)[:, length:]
    first = free[0].tolist().index(stop)
    assert out[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (out[0, first + 1 :] == processor.tokenizer.pad_token_id).all()


def test_saved_generation_settings_are_used(assistant, rows, tmp_path):
    """Chat models have several end marks, and they stand in generation_config.json only."""
    model, processor = assistant
    inputs = processor(text=rows[0][:1], images=rows[1][:1])
    length = inputs["input_ids"].shape[1]
    third = int(model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, length + 2])
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, third]
    model.generation_config.max_new_tokens = NEW
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.generation_config.eos_token_id == [processor.tokenizer.eos_token_id, third]
    answer = again.generate(**inputs, do_sample=False)[0, length:].tolist()
    assert len(answer) <= 3 and answer[-1] == third


def test_budget_changes_the_tokens_but_not_the_prompt(assistant, rows):
    model, processor = assistant
    inputs = processor(text=rows[0], images=rows[1])
    for compression, tokens in ((1.0, 64), (4.0, 16), (64.0, 1)):
        model.set_compression(compression)
        assert model.encode_images(inputs["pixel_values"]).lengths.tolist() == [tokens] * 4
        assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2
