"""One replica of the API on Ray Serve: what serve/ray_app.py deploys."""

from __future__ import annotations

import asyncio
import dataclasses
import re

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import load_engine, make_app, settings_of
from serve.server import bars_for_terminals_alone, leave_to_no_collector, log_to_stderr
from serve.settings import api_key

PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}")  # a request's number, which a client may have chosen, goes into the log


class Changes(BaseModel):
    """The `user_config` of the deployment: settings that replicas take without a restart."""

    model_config = ConfigDict(extra="forbid")

    time_limit: float | None = None
    max_new_tokens: int | None = None


class OfReplica:
    """Middleware: the response says which replica it is from (x-replica), and has one x-request-id, that of Ray's proxy, by which
    the log knows the request too."""

    def __init__(self, app: ASGIApp, replica: str):
        self.app, self.replica = app, replica.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        fit = PLAIN.fullmatch(given) is not None
        if fit:
            scope["state"] = {**scope.get("state", {}), "request_id": given}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if not (fit and name == b"x-request-id")]
                message = {**message, "headers": [*headers, (b"x-replica", self.replica)]}
            await send(message)

        await self.app(scope, receive, named)


class Assistant:
    """One replica: an engine, and the app over it. The methods are those that Ray Serve calls."""

    def __init__(self, args):
        """args: ray_app.Args."""
        from ray.serve import get_replica_context, metrics  # late: Ray is not everybody's

        log_to_stderr()
        bars_for_terminals_alone()
        self.replica = get_replica_context().replica_id.unique_id
        self.settings = settings_of(args, api_key(args.api_key_file), not args.any_host)
        self.engine = load_engine(args)
        leave_to_no_collector()
        self.gauges = {
            name: metrics.Gauge(f"llava_drip_engine_{name}", f"Engine.stats(): {name}.") for name in self.engine.stats()
        }

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = make_app(self.engine, self.settings)
        app.add_middleware(OfReplica, replica=self.replica)
        self.service = app.state.service
        return app

    def reconfigure(self, config: dict) -> None:
        """config: as `Changes`; what it leaves out is as the arguments say again."""
        changes = Changes.model_validate(config).model_dump(exclude_none=True)
        self.service.settings = dataclasses.replace(self.settings, **changes)

    async def check_health(self) -> None:
        """Raises where the device can compute no more: after some errors a process has lost its GPU for good."""
        await asyncio.to_thread(torch.ones((), device=self.engine.device).item)
        for name, value in self.engine.stats().items():  # /metrics through the proxy is that of any one replica
            self.gauges[name].set(value)
