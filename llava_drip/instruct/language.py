"""A small language model of our own, for where no pretrained one can be had: byte-level BPE tokenizer and a LLaMA.

It is saved in the ordinary format (config.json, model.safetensors, tokenizer.json), so every program takes it like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jinja2 import Template
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from llava_drip.assistant.processing import IMAGE_TOKEN
from llava_drip.instruct.data import checked_records, to_messages
from llava_drip.instruct.templates import BRIEF


def conversation_texts(path: str | Path) -> list[str]:
    """The rows of a conversation file as the text a language model reads in them, pictures left out.

    Raises:
        ValueError: naming the file, and the row that is none.
    """
    template, texts = Template(BRIEF), []
    for row in checked_records(path):
        for turn in row["conversations"]:
            turn["value"] = turn["value"].replace(IMAGE_TOKEN, "").strip()
        texts.append(template.render(messages=to_messages(row), bos_token="", eos_token="</s>").strip())
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts: any text can be encoded, frequent words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A leading space as inside a sentence, where most words stand.
    tokenizer.train_from_iterator((f" {text}" for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[IMAGE_TOKEN],
        chat_template=BRIEF,
    )


def train_small_llama(
    texts: Sequence[str],
    directory: str | Path,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    vocab_size: int = 768,
    context: int = 1024,
    dropout: float = 0.0,
    steps: int = 150,
    batch_size: int = 32,
    block: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Path:
    """Train a tokenizer and a LLaMA on texts by next-token prediction, and save both in `directory`.

    Args:
        texts: one document each; they are joined by the end mark and cut into blocks of `block` tokens.
        context: positions the model can be used with, tokens.
        dropout: of attention; it stays in the configuration, so that later training has it too.
        steps, batch_size: optimizer steps of batch_size blocks.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(texts, vocab_size)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            initializer_range=0.8 * hidden_size**-0.5,  # LLaMA's 0.02 is for thousands of dimensions: too faint here
            max_position_embeddings=context,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    ids = [i for row in tokenizer([f" {t}" for t in texts])["input_ids"] for i in [*row, tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
    if len(blocks) < batch_size:
        raise ValueError(f"the texts make {len(blocks)} blocks of {block} tokens; a batch takes {batch_size}")
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        save_strategy="no",
        logging_steps=max(1, steps // 5),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    dataset = [{"input_ids": row, "labels": row} for row in blocks]
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
