"""An assistant as lmms-eval's chat models are: given a task's messages, it says its answers.

python -m lmms_eval --model llava_drip --model_args pretrained=DIR,compression=4 --tasks TASK --batch_size 8 --output_path OUT
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from llava_drip.engine import Engine, RequestError
from llava_drip.evaluation.lmms.asked import Asked, entry, in_batches, read_messages
from llava_drip.evaluation.lmms.settings import Generation, Settings, seed_of, unused
from llava_drip.files import write_whole
from llava_drip.record import described, text_hash


class LlavaDrip(lmms):
    """A checkpoint of an assistant, asked through `Engine`, as the server and our own evaluations do."""

    is_simple = False

    def __init__(self, **model_args):
        """model_args: see Settings. ValueError names one that is not known, or what is wrong with the checkpoint."""
        super().__init__()
        self.settings = settings = Settings.read(model_args)
        self.engine = Engine.load(settings.pretrained, settings.device, settings.dtype, settings.compression)
        self.device = self.engine.device  # where lmms-eval counts the requests of all ranks
        self.dtype = next(self.engine.model.parameters()).dtype
        self.answers: list[dict] = []  # for the record
        self.warned: set[str] = set()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: lmms-eval 0.7.3 builds no such requests for chat models, and makes a string of the pair that is returned."""
        raise NotImplementedError("llava_drip: tasks of output_type loglikelihood or multiple_choice cannot be run")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each document's messages."""
        found = []
        for turn in self._answered(requests, many_rounds=False):
            usage = turn.replies[0].usage
            found.append(GenerationResult(turn.said[0], TokenCounts(usage.prompt_tokens, usage.new_tokens)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each document, until its task ends them."""
        return [turn.said for turn in self._answered(requests, many_rounds=True)]

    def clean(self) -> None:
        """lmms-eval calls it once, when all is answered and nothing scored: writes the record, frees the model."""
        if self.settings.record is not None:
            self._write_record()
        self.engine = None
        super().clean()

    def _answered(self, requests: list[Instance], many_rounds: bool) -> list[Asked]:
        """Requests, in their order, with their replies."""
        asked, seconds = self._asked(requests), 0.0
        with tqdm(total=len(asked), desc="llava_drip", unit="request", disable=self.rank != 0) as bar:
            for batch in in_batches(asked, self.settings.batch_size):
                live = batch
                while live:
                    spoken = [
                        (turn, turn.next_messages(self.task_dict[turn.task][turn.split][turn.doc])) for turn in live
                    ]
                    spoken = [(turn, messages) for turn, messages in spoken if messages is not None]
                    seconds += self._answer(spoken) if spoken else 0
                    live = [turn for turn, _ in spoken] if many_rounds else []
                bar.update(len(batch))
        self._log(asked, seconds)
        return asked

    def _asked(self, requests: Iterable[Instance]) -> list[Asked]:
        attempts: Counter = Counter()
        asked = []
        for request in requests:
            _, messages, given, doc, task, split = request.args
            if new := unused(given) - self.warned:
                logger.warning(
                    f"llava_drip: generation_kwargs of {task} that nothing is made of: {', '.join(sorted(new))}"
                )
                self.warned |= new
            try:
                generation = Generation.read(given)
            except ValueError as error:
                raise ValueError(f"{task}: {error}") from None
            counts = not request.metadata.get("__padding_only__")
            asked.append(Asked(task, split, doc, attempts[task, split, doc], messages, generation, counts))
            attempts[task, split, doc] += 1
        return asked

    def _answer(self, spoken: list[tuple[Asked, list]]) -> float:
        """Adds a reply to each of a batch, which share one Generation. Seconds it took."""
        requests = [read_messages(messages, turn.where) for turn, messages in spoken]
        first = spoken[0][0]
        how = first.generation
        # Of use where it is the only one: sampled ones are.
        seed = seed_of(self.settings.seed, first.task, first.split, first.doc, first.attempt, len(first.replies))
        try:
            replies = self.engine.answer_batch(requests, how.max_new_tokens, how.temperature, how.top_p, seed)
        except RequestError as error:
            raise ValueError(f"{spoken[error.number][0].where}: {error.reason}") from error
        seconds = replies[0].usage.total_ms / 1000
        for (turn, _), (messages, images), reply in zip(spoken, requests, replies, strict=True):
            turn.replies.append(reply)
            if self.settings.record is not None and turn.counts:
                self.answers.append(entry(turn, messages, images, seconds / len(spoken)))
        return seconds

    def _log(self, asked: list[Asked], seconds: float) -> None:
        """Numbers for "throughput" in lmms-eval's result file (of several processes: the first one's)."""
        usages = [reply.usage for turn in asked for reply in turn.replies]
        tokens, patches = sum(usage.new_tokens for usage in usages), sum(usage.patches for usage in usages)
        more = {"patches_per_image": float(self.engine.patches)}
        if patches:
            images = patches / self.engine.patches
            more["visual_tokens_per_image"] = sum(usage.visual_tokens for usage in usages) / images
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, more)

    def _write_record(self) -> None:
        answers, settings = self.answers, self.settings
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(answers, parts, dst=0)
            if parts is None:
                return
            answers = [answer for part in parts for answer in part]
        if not answers:  # a record of the run that made them stays
            logger.warning(f"llava_drip: {settings.record} is not written: all answers came from lmms-eval's cache")
            return
        answers.sort(key=lambda row: (row["task"], row["split"], row["doc_id"], row["attempt"], row["round"]))
        images = sum(row["images"] for row in answers)
        header = described(
            checkpoint=settings.pretrained,
            prompts=[row.pop("prompt") for row in answers],
            compression=settings.compression,
            tokens_per_image=sum(row["visual_tokens"] for row in answers) / images if images else None,
            seconds=sum(row["seconds"] for row in answers),
            device=str(self.device),
            packages=("lmms_eval", "datasets"),
            pictures={"sha256": text_hash([row.pop("pictures") for row in answers]), "count": images},
            tasks=dict(Counter(row["task"] for row in answers)),
            settings={"batch_size": settings.batch_size, "dtype": str(self.dtype), "seed": settings.seed},
        )
        write_whole(settings.record, json.dumps({"run": header, "answers": answers}, indent=1))
