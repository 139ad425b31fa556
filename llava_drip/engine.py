"""Answer questions about pictures with a trained assistant: load it, stream a reply, stop it, answer in batches.

The server, the chat page and the evaluations all answer through `Engine`, so what is measured is what is served.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from llava_drip.assistant.build import check_checkpoint, load_assistant
from llava_drip.assistant.processing import view
from llava_drip.assistant.quantization import Quantization
from llava_drip.cli import checked_device
from llava_drip.conversation import PlainText, checked_turns, write_chat
from llava_drip.scheduling.features import at_compression, digest
from llava_drip.scheduling.limits import Limits
from llava_drip.scheduling.requests import QueueFull, StreamEvent, Usage, WorkFailed
from llava_drip.scheduling.row import Picture, Request, too_long
from llava_drip.scheduling.sampling import NOT_USED, sampling_arguments
from llava_drip.scheduling.text import checked_stops
from llava_drip.scheduling.worker import Scheduler
from llava_drip.towers.arguments import asked_compression
from llava_drip.towers.contract import check_budget

__all__ = ["Engine", "QueueFull", "Reply", "RequestError", "StreamEvent", "Usage", "WorkFailed"]

Messages = Sequence[dict]  # [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...]


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    usage: Usage


class RequestError(ValueError):
    """One request of a batch that cannot be answered.

    Attributes:
        number: its place in the batch, from 0.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, reason: str):
        super().__init__(f"request {number}: {reason}")
        self.number, self.reason = number, reason


class _Watch(StoppingCriteria):
    """Called by generate after every token of a batch: notes when the first came, counts them, ends rows at their budgets."""

    def __init__(self, budgets: Tensor, strings: StopStringCriteria | None):
        """budgets: [B] int64, as many tokens each row may write; strings: end a row too, which makes them its budget.

        stopped: [B] bool, the rows that did.
        """
        self.first, self.steps = None, 0
        self.budgets, self.strings, self.stopped = budgets, strings, torch.zeros_like(budgets, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        if self.first is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            self.first = time.perf_counter()
        self.steps += 1
        if self.strings is not None:
            found = self.strings(input_ids, scores) & (self.steps <= self.budgets)  # not in the padding of an ended row
            self.stopped = self.stopped | found
            self.budgets = self.budgets.masked_fill(found, self.steps)
        return self.budgets <= self.steps


class Engine:
    """A loaded assistant. Safe to call from several threads: streams share a running batch, all else takes its turn.

    `lock` is held by whoever uses the model.
    """

    def __init__(self, model, processor, **limits: int | None):
        """model: LlavaDripForConditionalGeneration, on its device. processor: LlavaDripProcessor.
        limits: fields of scheduling.Limits: max_waiting, max_rows, max_cached_tokens, ..."""
        self.model, self.processor = model.eval(), processor
        self.scheduler = Scheduler(model, processor.tokenizer, Limits(**limits))
        self.lock = self.scheduler.lock
        # Its own, as tokenizers are not made for several threads, and the scheduler's decodes with the other.
        self.encoder, self.encoding = copy.deepcopy(processor.tokenizer), threading.Lock()
        self.grid_size: tuple[int, int] = tuple(model.vision_tower.patch_embed.grid_size)
        self.plain = PlainText(processor)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compression: float | None = None,
        quantization: Quantization | None = None,
        **limits: int | None,
    ) -> Engine:
        """Loads a folder written by `save_pretrained` (config.json, *.safetensors, tokenizer and processor files).

        Args:
            directory: the folder. Never a hub name, and never pickled weights.
            device: default: cuda where there is one, else cpu.
            dtype: default: bfloat16 on cuda, float32 elsewhere.
            compression: patches per visual token to keep; None: as the checkpoint says, or else each image decides.
            quantization: of the language model's linear layers; None: they are held as `dtype` says.
            limits: fields of scheduling.Limits: max_waiting, max_rows, max_cached_tokens, ...

        Raises:
            ValueError: naming the folder and what is wrong with it.
        """
        directory = check_checkpoint(directory, assistant=True)
        device, dtype = placement(device, dtype)
        model, processor = load_assistant(directory, dtype, quantization)
        if compression is not None:
            model.set_compression(compression)
        return cls(model.to(device), processor, **limits)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def stream(
        self,
        messages: Messages,
        images: Sequence[Image.Image | Picture] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        cancel: threading.Event | None = None,
        *,
        compression: float | None = None,
        max_visual_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        time_limit: float | None = None,
    ) -> Iterator[StreamEvent]:
        """Yields the reply to a conversation piece by piece.

        Args:
            messages: turns as in transformers, with one {"type": "image"} part for each picture.
            images: RGB pictures in the order of those parts, or what `prepared` made of them.
            max_new_tokens: at most so many tokens; fewer when the model's context is full.
            temperature: 0 is greedy.
            top_p: nucleus of the probabilities sampled from; used when temperature > 0.
            seed: makes sampling repeatable.
            cancel: set it, from any thread, to end the reply after the token in work. Leaving the loop does the same.
            compression: patches per visual token of this request's images; None: as the model is set.
            max_visual_tokens: the same as a number of tokens for each image; at most one of the two.
            stop: up to 4 strings; the reply ends before the first of them.
            time_limit: seconds from the call, waiting included, after which the reply ends with finish "timeout".

        Raises:
            ValueError: a bad argument or conversation, at the call or the first `next`.
            QueueFull: too many requests wait; at the call. What fails while generating reaches the caller too.
        """
        sampling = sampling_arguments(max_new_tokens, temperature, top_p)
        compression = self.checked_budget(compression, max_visual_tokens)
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit must be above 0 seconds, got {time_limit}")
        deadline = float("inf") if time_limit is None else time.perf_counter() + time_limit
        stops = checked_stops(stop)
        if seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**64):
            raise ValueError(f"seed must be a whole number of 64 bits, got {seed!r}")
        self.scheduler.check_room()  # before work on what will be refused
        prompt = self._prompt(messages, images)
        with self.encoding:
            ids = torch.tensor(self.encoder(prompt, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        if len(ids) >= self.scheduler.preparer.context:  # before it is embedded
            raise ValueError(too_long(Usage(0, 0, len(ids)), self.scheduler.preparer.context))
        pictures = [self._picture(image) for image in images]
        request = Request(
            ids=ids,
            pixels=[picture.pixels for picture in pictures],
            digests=[picture.digest for picture in pictures],
            patches=self.patches * len(pictures),
            compression=compression,
            generation=self._generation(sampling),
            seed=seed,
            stop=stops,
            cancels=[threading.Event()] + ([] if cancel is None else [cancel]),
            deadline=deadline,
        )
        return self.scheduler.submit(request)

    def prepared(self, images: Sequence[Image.Image]) -> list[Picture]:
        """What `stream` does to pictures first, done once for several streams about them. QueueFull: as there."""
        self.scheduler.check_room()
        return [self._picture(image) for image in images]

    def _picture(self, image: Image.Image | Picture) -> Picture:
        if isinstance(image, Picture):
            return image
        # One by one: what a picture becomes must not depend on the others.
        pixels = self.processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
        return Picture(pixels, digest(pixels))

    def checked_budget(self, compression: float | None = None, max_visual_tokens: int | None = None) -> float | None:
        """Patches per visual token that a request asks for, either way. ValueError names what is wrong."""
        if compression is None and max_visual_tokens is None:
            return None
        if compression is not None and max_visual_tokens is not None:
            raise ValueError("give compression or max_visual_tokens, not both")
        check_budget(self.model.vision_tower, self.model.config.vision_config["architecture"])
        if max_visual_tokens is not None:
            if not 1 <= max_visual_tokens <= self.patches:
                raise ValueError(f"max_visual_tokens must be 1 to {self.patches}, got {max_visual_tokens}")
            compression = self.patches / max_visual_tokens
        return float(asked_compression(compression, 1.0))

    def stats(self) -> dict[str, int]:
        """What the scheduler has to do and has done since the start.

        Returns:
            waiting, running: requests now. prefilled_tokens, decoded_tokens: read of prompts, written. cached_tokens: of prompts,
            that needed no reading. image_hits, image_misses, prefix_hits, prefix_misses: of the two caches; and what they hold:
            images_cached_bytes, prefixes_cached_tokens. stop, length, cancelled, timeout: replies that ended so; failed: with an
            error; refused: for want of room in the queue. parked: how often a reply gave its place up to others. steps.
        """
        return self.scheduler.stats()

    def close(self) -> None:
        """Takes no more streams, and returns when those that run or wait have ended."""
        self.scheduler.close()

    def answer_batch(
        self,
        requests: Sequence[tuple[Messages, Sequence[Image.Image]]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Reply]:
        """Answers several conversations in one left-padded batch, each (messages, images) as in `stream`.

        Greedy (temperature 0), each gets the answer that it would get alone, up to what rounding does in another shape,
        and except near the context's limit with rotary frequencies that follow the batch's length ("dynamic" RoPE).
        Sampled, it depends on the whole batch: one seed serves all of it.

        Raises:
            RequestError: naming the request by its place in the batch.
            ValueError: a bad sampling argument.
        """
        if not requests:
            return []
        prompts = []
        for number, (messages, images) in enumerate(requests):
            try:
                prompts.append(self._prompt(messages, images))
            except ValueError as error:
                raise RequestError(number, str(error)) from error
        sampling = sampling_arguments(max_new_tokens, temperature, top_p)
        with self.lock:
            return self._generate(prompts, [list(images) for _, images in requests], sampling, seed)

    def segments(
        self, image: Image.Image, compression: float | None = None, max_visual_tokens: int | None = None
    ) -> tuple[int, Tensor | None, tuple[int, int]]:
        """How the tower divides one picture. The budget is as in `stream`.

        Returns:
            visual tokens; the token of each patch, [patches] int64 on the CPU in raster order (None from a tower whose
            tokens are not segments); patch rows and columns. They cover what `view` shows.
        """
        with self._tower([image], compression, max_visual_tokens) as pixels:
            tokens = self.model.encode_images(pixels)
        count, rows_columns = int(tokens.lengths[0]), self.grid_size
        if tokens.segments is not None:
            return count, tokens.segments[0].cpu(), rows_columns
        return count, torch.arange(count) if count == self.patches else None, rows_columns

    def embed(
        self, images: Sequence[Image.Image], compression: float | None = None, max_visual_tokens: int | None = None
    ) -> tuple[Tensor, list[int]]:
        """Pictures as vectors of length 1: what the tower pools of its last block, before any projector. The budget is as in
        `stream`.

        Returns:
            [B, tower width] fp32 on the CPU; the visual tokens of each picture.
        Raises:
            ValueError: the budget, as `checked_budget` has it.
        """
        with self._tower(images, compression, max_visual_tokens) as pixels:
            tower = self.model.vision_tower
            tokens = tower.forward_features(pixels.to(next(tower.parameters()).dtype))
            vectors = torch.nn.functional.normalize(tower.forward_head(tokens).float(), dim=-1)
        return vectors.cpu(), tokens.lengths.tolist()

    @contextlib.contextmanager
    def _tower(self, images, compression, max_visual_tokens) -> Iterator[Tensor]:
        """The tower to oneself, with a budget; yields pixels [B, 3, height, width]."""
        compression = self.checked_budget(compression, max_visual_tokens)
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        with self.lock, torch.inference_mode(), at_compression(self.model, compression):
            yield pixels.to(self.device)

    def view(self, image: Image.Image) -> Image.Image:
        """What the tower sees of a picture, at the picture's own resolution."""
        return view(image, self.processor.image_processor)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid_size[0] * self.grid_size[1]

    def _prompt(self, messages: Messages, images: Sequence[Image.Image]) -> str:
        """The conversation as the chat template writes it, with user text made plain. ValueError names the message."""
        turns = checked_turns(messages, len(images), self.plain)
        return write_chat(self.processor.tokenizer, turns, self.processor.chat_template, add_generation_prompt=True)

    def _generation(self, sampling: dict) -> GenerationConfig:
        """The checkpoint's settings with a request's in them."""
        # Not a deep copy: what is replaced below is replaced whole.
        generation, tokenizer = copy.copy(self.model.generation_config), self.processor.tokenizer
        eos = generation.eos_token_id
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = min([eos] if isinstance(eos, int) else eos or [0])
        generation.update(**sampling | NOT_USED | {"pad_token_id": pad})
        return generation

    @torch.inference_mode()
    def _generate(self, prompts, images, sampling, seed) -> list[Reply]:
        """B prompts with their images → B replies, under the lock."""
        model, tokenizer, started = self.model, self.processor.tokenizer, time.perf_counter()
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt").to(self.device)
        # Not model.generate: the true length must be known before the start.
        embeds, expanded = model.embed(**inputs)
        usages = [
            Usage(visual, self.patches * len(row), prompt)
            for visual, prompt, row in zip(
                expanded.is_image.sum(1).tolist(), expanded.attention_mask.sum(1).tolist(), images
            )
        ]
        context = getattr(model.config.text_config, "max_position_embeddings", 2**31)
        for number, usage in enumerate(usages):
            if usage.prompt_tokens >= context:
                raise RequestError(number, too_long(usage, context))
        # Each row may fill its own context: how much a row may say must not depend on how long the others are. (What it
        # says does not either when greedy; see answer_batch.)
        budgets = [min(sampling["max_new_tokens"], context - usage.prompt_tokens) for usage in usages]
        generation = self._generation(sampling)
        # Our own, not generate's, to know where in each row it ended.
        strings = StopStringCriteria(tokenizer, generation.stop_strings) if generation.stop_strings else None
        watch = _Watch(torch.tensor(budgets, device=self.device), strings)
        generation.update(max_new_tokens=max(budgets), stop_strings=None)
        if seed is not None:
            torch.manual_seed(seed)
        ids = model.generate_from(
            embeds,
            expanded,
            defaults=generation,  # else a None would be the checkpoint's again
            generation_config=generation,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        eos = model.generation_config.eos_token_id
        eos = {eos} if isinstance(eos, int) else set(eos or ())
        replies, now = [], time.perf_counter()
        took = {"first_token_ms": 1000 * (watch.first - started), "total_ms": 1000 * (now - started)}
        for row, usage, budget, stopped in zip(ids.tolist(), usages, watch.budgets.tolist(), watch.stopped.tolist()):
            row = row[:budget]  # what follows is padding
            end = next((place for place, token in enumerate(row) if token in eos), None)
            row = row[: len(row) if end is None else end + 1]
            usage = replace(
                usage, new_tokens=len(row), finish="stop" if stopped or end is not None else "length", **took
            )
            replies.append(Reply(tokenizer.decode(row, skip_special_tokens=True).strip(), usage))
        return replies


def placement(device: str | torch.device | None, dtype: str | torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Where `Engine.load` puts a model and in which precision, defaults filled in. ValueError names a bad one."""
    device = checked_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype!s}: give float32, bfloat16 or float16")
    return device, dtype
