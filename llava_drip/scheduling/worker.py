"""The scheduler: a queue of requests and the one thread that works on them, step by step.

A step ends what is over, lets requests join, reads a bounded piece of new prompts, and writes one token of every other reply. In
the queue it is first come, first served; who has written its quantum while others wait for a place goes to the end of it, and
takes its keys and values along.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from llava_drip.scheduling.batch import RunningBatch, why_one_at_a_time
from llava_drip.scheduling.fair_lock import FairLock
from llava_drip.scheduling.generate import generate_alone
from llava_drip.scheduling.limits import Limits
from llava_drip.scheduling.line import WaitingLine
from llava_drip.scheduling.prefixes import PrefixCache
from llava_drip.scheduling.preparation import IMAGES_A_STEP, Pace, Preparer, synchronize
from llava_drip.scheduling.requests import Finish, QueueFull, WorkFailed
from llava_drip.scheduling.row import Request, Row
from llava_drip.scheduling.sampling import next_tokens
from llava_drip.scheduling.ticket import ReplyStream

log = logging.getLogger(__name__)
LEAST_PREFILL = 128  # tokens of prompts in a step, however slow the machine is
READ_FOR_ONE = 16  # tokens of a prompt that count as one written
AT_EXIT = 5.0  # seconds that a program's end waits for the step in work
IDLE = 2.0  # seconds after which the thread ends, lest it keep a model alive that nobody uses


_SCHEDULERS: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Answers requests of several threads on one model. `lock` is held while it works; who else uses the model takes it too."""

    def __init__(self, model, tokenizer, limits: Limits):
        """model: LlavaDripForConditionalGeneration in eval mode."""
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.lock = FairLock()
        self.preparer = Preparer(model, tokenizer, limits.image_bytes)
        self.reading = Pace(LEAST_PREFILL, max(LEAST_PREFILL, limits.prefill_tokens))
        self.max_tokens = limits.cached_tokens(model)
        self.prefixes = PrefixCache(self.max_tokens // 2)
        self.why_alone = why_one_at_a_time(model.language_model)
        if self.why_alone:
            log.warning("requests are answered one at a time: %s", self.why_alone)
            self.batch = None
        else:
            self.batch = RunningBatch(model.language_model, limits.max_rows, self.max_tokens // 2)
        self.line = WaitingLine(limits.max_waiting)
        self.current: Row | None = None  # neither in the queue nor in the batch
        self.outgoing: list[tuple[Row, object]] = []
        self.counts: Counter[str] = Counter()
        self.thread: threading.Thread | None = None  # the last one: it is waited for even when it takes no more
        self.taking = False  # whether it will look at the queue again
        self.closed = False
        _SCHEDULERS.add(self)

    # Callers' threads

    def submit(self, request: Request) -> ReplyStream:
        """Raises: QueueFull. RuntimeError: closed."""
        row = Row(request, self.tokenizer)
        with self.line.changed:
            if self.closed:
                raise RuntimeError("this engine is closed")
            try:
                self.line.enter(row, self._places)
            except QueueFull:
                self.counts["refused"] += 1
                raise
            if not self.taking:
                thread = threading.Thread(target=self._run, name="llava_drip scheduler", daemon=True)
                try:
                    thread.start()  # which waits for `changed`
                except BaseException:
                    self.line.leave(row)
                    raise
                self.thread, self.taking = thread, True
        return ReplyStream(row, self._withdraw)

    def check_room(self) -> None:
        """Raises: QueueFull. Before any work on a request, which `submit` asks again."""
        with self.line.changed:
            try:
                self.line.check_room(self._places)
            except QueueFull:
                self.counts["refused"] += 1
                raise

    @property
    def _places(self) -> int:
        """Of the batch that nobody has, nor is about to have."""
        most = self.batch.max_rows if self.batch else 1
        return most - len({*self._rows, *([self.current] if self.current else [])})

    def _withdraw(self, row: Row) -> bool:
        with self.line.changed:
            left = self.line.leave(row)
            self.counts[row.request.over or "cancelled"] += left
        return left

    def stats(self) -> dict[str, int]:
        """See Engine.stats."""
        running = len(self._rows) + (self.current is not None)
        features = self.preparer.features
        kept = {"images_cached_bytes": features.bytes, "prefixes_cached_tokens": self.prefixes.tokens}
        hits = {f"image_{name}": getattr(features, name) for name in ("hits", "misses")}
        hits |= {f"prefix_{name}": getattr(self.prefixes, name) for name in ("hits", "misses")}
        names = ("prefilled_tokens", "decoded_tokens", "cached_tokens", "steps", "parked", "refused", "failed")
        ends = ("stop", "length", "cancelled", "timeout")
        return {
            "waiting": len(self.line),
            "running": running,
            **{name: self.counts[name] for name in (*names, *ends)},
            **hits,
            **kept,
        }

    def close(self) -> None:
        """Takes no more requests, and waits until those that are there have ended."""
        with self.line.changed:
            self.closed = True
            self.line.changed.notify_all()
            thread = self.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def abort(self) -> None:
        """Cancels all, and waits a little for the step in work."""
        with self.line.changed:
            self.closed, thread = True, self.thread
            for row in (*self.line.rows, *self._rows, *([self.current] if self.current else [])):
                row.request.cancels[0].set()
            self.line.changed.notify_all()
        if thread is not None:
            thread.join(AT_EXIT)

    # The worker's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while True:
                    with self.line.changed:
                        self.line.changed.wait_for(lambda: self.line.rows or self.closed, IDLE)
                        if not self.line.rows:
                            self.taking = False
                            self.line.is_idle()
                            return
                    self._work()
        except BaseException as error:  # a failure while a failure was dealt with: a GPU that is gone, say
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """Nobody waits for a thread that is no more. The next request starts another."""
        log.error("the thread that answers requests ended: %s", type(error).__name__)
        with self.line.changed:
            self.taking = False
            rows = [*self._rows, *([self.current] if self.current else []), *self.line.take_all()]
        if self.batch:
            self.batch.rows, self.batch.decoding = [], 0
        self.current = None
        for row in dict.fromkeys(rows):
            self._tell_failure(row, error, of_request=False)
        self._deliver()

    def _work(self) -> None:
        """Steps until nothing is left to do."""
        with self.lock:
            while True:
                try:
                    self._step()
                except Exception as error:  # out of memory, say: it ends what runs, and not the service
                    self._fail(error)
                if not (self.line.rows or self._rows):
                    break
                self._deliver()  # before others have the model, for however long
                self.lock.give_way()
        self._deliver()  # after the release: who has its last event finds the model free

    @property
    def _rows(self) -> list[Row]:
        return self.batch.rows if self.batch else []

    def _step(self) -> None:
        self.counts["steps"] += 1
        self._drop_what_is_over()
        if self.batch is None:
            return self._next_alone()
        self._admit()
        if self.batch.decoding < len(self.batch.rows):
            through = self._read_prompts()
            if through:
                self._write([row for row, _ in through], torch.stack([logits for _, logits in through]))
        if rows := self.batch.rows[: self.batch.decoding]:
            self._write(rows, self.batch.decode())

    def _read_prompts(self) -> list[tuple[Row, Tensor]]:
        """As RunningBatch.prefill. What is read of a prompt counts against its row's quantum, until it writes."""
        before, started = [(row, row.length) for row in self.batch.rows[self.batch.decoding :]], time.perf_counter()
        through = self.batch.prefill(min(self.reading.amount, self.limits.prefill_tokens))
        synchronize(self.batch.device)
        read = sum(row.length - length for row, length in before)
        self.reading.took(read, time.perf_counter() - started)
        self.counts["prefilled_tokens"] += read
        for row, length in before:
            row.quantum += (row.length - length) / READ_FOR_ONE
        for row, _ in through:
            row.quantum = 0.0
        return through

    def _write(self, rows: list[Row], logits: Tensor) -> None:
        """One token of each. logits: [rows, V]. What goes wrong with one row ends that row alone."""
        tokens, errors = next_tokens(rows, logits)
        chosen, broken = torch.stack([tokens, logits.isnan().any(-1).long()]).tolist()  # the one wait for a GPU
        for place, (row, token, not_numbers) in enumerate(zip(rows, chosen, broken)):
            try:
                if not_numbers:
                    raise FloatingPointError("the model's output is not a number")
                if place in errors:
                    raise errors[place]
                self._push(row, token)
            except Exception as error:
                if row in self.batch.rows:
                    self.batch.leave(row)  # and nothing of it is kept
                self._tell_failure(row, error, of_request=False)

    def _drop_what_is_over(self) -> None:
        for row in list(self._rows):
            if finish := row.request.over:
                self._end(row, finish)
        for row, finish in self.line.take_those_that_are_over():
            self._tell_end(row, finish)

    def _admit(self) -> None:
        """The head of the queue joins, and the next, until one has to wait for a place."""
        encoded, turns = False, len(self.line)  # not of those who are parked for them
        while turns and (row := self.line.head) is not None:
            if len(self.batch.rows) >= self.batch.max_rows and not self._park_one():
                return
            if row.visual is None:
                if encoded:  # the others have waited long enough
                    return
                self._encode(self.batch.max_rows - len(self.batch.rows) + IMAGES_A_STEP)
                encoded = True
                continue
            if not self._prepare(row):
                continue
            while not self.batch.fits(row):
                if not self._park_one():
                    return
            if self._claim(row):
                if row.kept is None and not row.length:
                    row.kept, row.length = self.prefixes.find(row.sequence)
                    row.usage = replace(row.usage, cached_tokens=row.length)
                    self.counts["cached_tokens"] += row.length
                row.parked = False
                row.go_on()
                self.batch.join(row)
                self.current = None
                turns -= 1

    def _claim(self, row: Row) -> bool:
        """Takes a row out of the line, unless its caller has."""
        with self.line.changed:
            self.current = row if self.line.leave(row) else None
        return self.current is not None

    def _encode(self, places: int) -> None:
        """The pictures of the next rows, also of some that have no place yet, for a tower is quicker with many at once. If they
        fail together each is tried by itself: an error is that of its row."""
        rows = [row for row in self.line.first(places) if row.visual is None]
        try:
            self.preparer.encode(rows)
        except Exception as error:
            if len(rows) > 1:
                return self._encode(1)
            self._refuse(rows[0], error)

    def _prepare(self, row: Row) -> bool:
        """False: it cannot be answered, and has been told."""
        if row.sequence is not None:
            return True
        try:
            self.preparer.prepare(row)
            return True
        except Exception as error:
            self._refuse(row, error)
            return False

    def _refuse(self, row: Row, error: Exception) -> None:
        if self._claim(row):
            self._tell_failure(row, error, of_request=True)
        self.current = None

    def _park_one(self) -> bool:
        """Whoever has written or read most since it got its place gives it up for a while; False: nobody has had its quantum."""
        row = max(self.batch.rows, key=lambda row: row.quantum, default=None)
        if row is None or row.quantum < self.limits.quantum:
            return False
        parked = self.line.parked_tokens
        if parked + row.length > self.prefixes.max_tokens:
            return False
        self.prefixes.shrink(self.prefixes.max_tokens - parked - row.length)
        kept = self.batch.take(row)
        self.batch.leave(row)
        row.kept = kept
        row.pause()
        self.line.park(row)
        self.counts["parked"] += 1
        return True

    def _push(self, row: Row, token: int) -> None:
        self.counts["decoded_tokens"] += 1
        events, finish = row.push(token)
        self.outgoing += [(row, event) for event in events]
        if finish:
            self._end(row, finish)

    def _end(self, row: Row, finish: Finish) -> None:
        """A row of the batch is through: what it has read and written is kept for the next turn of its conversation."""
        room = self.prefixes.max_tokens - self.line.parked_tokens
        if row.prefilled and row.length <= room:
            self.prefixes.shrink(room - row.length)
            read = row.sequence.followed_by(row.tokens[: row.length - row.prompt_length])
            self.prefixes.add(read, self.batch.take(row))
        self.batch.leave(row)
        self._tell_end(row, finish)

    def _tell_end(self, row: Row, finish: Finish) -> None:
        with self.line.changed:
            self.counts[finish] += 1
        self.line.reply_ended()
        self.outgoing += [(row, event) for event in row.end(finish)]

    def _tell_failure(self, row: Row, error: Exception, of_request: bool) -> None:
        """of_request: a ValueError says what is wrong with the request, and not with the work."""
        self.counts["failed"] += 1
        if not (of_request and isinstance(error, ValueError)):
            cause, error = error, WorkFailed(f"{type(error).__name__}: {error}")
            error.__cause__ = cause
        self.outgoing.append((row, error))

    def _fail(self, error: Exception) -> None:
        """A step failed: it ends what was in work. What is kept is let go, for the sake of memory."""
        rows = list(dict.fromkeys(row for row in (*self._rows, self.current) if row is not None))
        if not rows and (head := self.line.head) is not None and self._claim(head):  # else it would fail for ever
            rows = [head]
        log.error("%d requests failed: %s", len(rows), type(error).__name__)  # its message may quote a prompt
        for row in rows:
            self._tell_failure(row, error, of_request=False)
        self.current = None  # what follows may fail too: then _give_up delivers
        if self.batch:
            self.batch.reset()
        self.prefixes.shrink(0)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _next_alone(self) -> None:
        """One request, from its beginning to its end."""
        self._encode(1)
        row = self.line.head
        if row is None or row.visual is None or not self._prepare(row) or not self._claim(row):
            return
        self.counts["prefilled_tokens"] += row.prompt_length
        row.go_on()

        def tell(token: int) -> Finish | None:
            self.counts["decoded_tokens"] += 1
            events, finish = row.push(token)
            self.outgoing += [(row, event) for event in events]
            self._deliver()
            return finish or row.request.over

        finish = generate_alone(self.model, row, tell)
        self.current = None
        self._tell_end(row, finish)

    def _deliver(self) -> None:
        outgoing, self.outgoing = self.outgoing, []
        for row, event in outgoing:
            row.outbox.put(event)


@atexit.register
def _abort_all() -> None:
    """A thread that is within torch while Python goes takes the process down with it ("terminate called ...")."""
    for scheduler in list(_SCHEDULERS):
        scheduler.abort()
