"""A server of the API to be measured: started for that, or there already; what its /metrics say, second by second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

END_SECONDS = 20.0


@dataclass(frozen=True)
class Sample:
    """at: perf_counter. resident: bytes of the process. waiting, running: requests in its scheduler."""

    at: float
    resident: float
    waiting: float
    running: float


@contextlib.contextmanager
def started(repository: Path, model: Path, flags: Sequence[str], threads: int, log: Path) -> Iterator[str]:
    """`python -m serve.api` of a repository on a free port of loopback; its address. It is ended with the block.

    threads: of its process, for torch. log: file of what it says.
    Raises:
        ValueError: it ended before it was ready, with its last line.
    """
    command = [sys.executable, "-m", "serve.api", "--model", str(model), "--port", "0", *flags]
    paths = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    environment.pop("LLAVA_DRIP_API_KEY", None)
    with open(log, "w+", encoding="utf-8") as file:
        server = subprocess.Popen(
            command, cwd=repository, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
        try:
            address = re.search(r"api at (http://\S+)/v1", server.stdout.readline())
            if address is None:
                server.wait(END_SECONDS)
                file.seek(0)
                said = file.read().strip().splitlines() or [f"exit status {server.returncode}"]
                raise ValueError(f"the server ended before it was ready: {said[-1]}")
            yield address[1]
        finally:
            server.terminate()
            try:
                server.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(END_SECONDS)
            server.stdout.close()


class Watch:
    """Reads /metrics, within its block once a second. ValueError at the block's end: it could not."""

    def __init__(self, url: str, key: str = "none"):
        self.url, self.headers = url, {"Authorization": f"Bearer {key}"}
        self.samples: list[Sample] = []
        self.task: asyncio.Task | None = None

    async def metrics(self) -> dict[str, float]:
        """Sums over the labels of each metric. ValueError: there are none."""
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                reply = await client.get(f"{self.url}/metrics", headers=self.headers)
                reply.raise_for_status()
        except httpx.HTTPError as error:
            raise ValueError(f"{self.url}/metrics: {error}") from error
        values: Counter[str] = Counter()
        with contextlib.suppress(ValueError):  # no metrics at all, which is said below
            for family in text_string_to_metric_families(reply.text):
                for sample in family.samples:
                    values[sample.name] += sample.value
        if "llava_drip_engine_running" not in values:
            raise ValueError(f"{self.url}/metrics: it is no server of llava_drip")
        return values

    async def _read(self) -> None:
        while True:
            began = time.perf_counter()
            values = await self.metrics()
            names = ("process_resident_memory_bytes", "llava_drip_engine_waiting", "llava_drip_engine_running")
            self.samples.append(Sample(time.perf_counter(), *(values.get(name, 0.0) for name in names)))
            await asyncio.sleep(max(0.0, began + 1 - time.perf_counter()))

    async def __aenter__(self) -> Watch:
        await self.metrics()
        self.task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
