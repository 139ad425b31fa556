"""python -m serve.ray_app --model DIR [--num-replicas 2] [--num-gpus 1] [--host 127.0.0.1] [--port 8000]

The API of `python -m serve.api` by several replicas, on this machine or a Ray cluster. Ray's own commands start it too:

    serve run serve.ray_app:app model=DIR num_replicas=2
    serve run serve/deploy/ray.yaml

docs/guides/scaling.md says how it scales, rolls and fails; SECURITY.md, what Ray opens.
"""

# No `from __future__ import annotations`: Ray reads the class of `app`'s argument from its annotation.
import os
import secrets
import signal
import threading
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llava_drip import cli
from llava_drip.assistant.build import check_checkpoint
from llava_drip.scheduling.limits import Limits
from serve.api import arguments, settings_of
from serve.replica import Assistant
from serve.settings import KEY, api_key, check_place, is_loopback, warn_of_no_key

APPLICATION = "llava_drip"
HEALTH_SECONDS = 5.0  # between two looks at a replica; a dead one is missed at the next
CONSTRUCTIONS = 3  # tries to start a replica before a deployment has failed
NO_ACCESS_LOG = {"enable_access_log": False}  # the guard has a line for each request, without the client's address


class Args(BaseModel):
    """What `serve run` takes as key=value, and a configuration file under `args`: the flags of `serve.api`, and these.

    Attributes:
        num_replicas: how many; with max_replicas, at least so many.
        max_replicas: as many as the requests need, up to so many; None: always num_replicas.
        target_ongoing_requests: under way and waiting for a replica, above which there are more replicas; None: max_rows.
        num_cpus, num_gpus: that Ray sets aside for each replica; may be parts of one. Ray may hide GPUs from a replica of 0.
        any_host: without a key, requests are taken whatever machine their Host header names.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Path
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    bits: int | None = None
    compression: float | None = None
    api_key_file: Path | None = None
    remote_images: bool = False
    time_limit: float = 120.0
    max_new_tokens: int = 512
    most_new_tokens: int | None = None
    max_waiting: int = 64
    max_rows: int = 64
    max_cached_tokens: int | None = None
    image_cache_mib: float = Field(256.0, ge=0, allow_inf_nan=False)
    drain_seconds: float = Field(60.0, ge=0)
    docs: bool = False
    num_replicas: int = Field(1, ge=1)
    max_replicas: int | None = None
    target_ongoing_requests: float | None = Field(None, gt=0)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    any_host: bool = False

    @model_validator(mode="after")
    def check(self) -> "Args":
        """What only a replica would find otherwise, minutes later."""
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas must be at least num_replicas {self.num_replicas}, got {self.max_replicas}")
        if self.target_ongoing_requests is not None and self.max_replicas is None:
            raise ValueError("target_ongoing_requests has no meaning without max_replicas; give that too")
        settings_of(self, None, True)
        Limits(self.max_waiting, self.max_rows, self.max_cached_tokens)
        return self


def ray_serve():
    """ray.serve, whose import is left to those who use it. ValueError: there is no Ray."""
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError(
            f"Ray Serve cannot be imported ({error}); pip install -e '.[ray]' in the repository"
        ) from error
    return serve


def app(args: Args) -> "ray.serve.Application":  # noqa: F821
    """The application: replicas as the arguments say. A replica is sent what its rows and its queue hold and no more; as many
    as one queue holds wait in each proxy, and one more is answered 429."""
    serve = ray_serve()
    replicas = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        target = args.target_ongoing_requests or args.max_rows
        bounds = {"min_replicas": args.num_replicas, "max_replicas": args.max_replicas}
        replicas = {"autoscaling_config": {**bounds, "target_ongoing_requests": target}}
    deployment = serve.deployment(
        serve.ingress()(Assistant),
        name="Assistant",
        max_ongoing_requests=args.max_rows + args.max_waiting,
        max_queued_requests=max(1, args.max_waiting),
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        graceful_shutdown_timeout_s=args.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=CONSTRUCTIONS,
        logging_config=NO_ACCESS_LOG,
        **replicas,
    )
    return deployment.bind(args)


def ray_arguments() -> cli.ArgumentParser:
    parser = arguments("ray_app", "Serve an assistant behind OpenAI's API by several replicas, on Ray Serve.")
    parser.add_argument("--num-replicas", type=int, default=1, help="how many; with --max-replicas, at least so many")
    parser.add_argument("--max-replicas", type=int, help="as many as the requests need, up to so many")
    parser.add_argument(
        "--target-ongoing-requests", type=float, help="a replica, above which there are more; default: --max-rows"
    )
    parser.add_argument(
        "--num-cpus", type=float, default=1.0, help="of each replica; a part of one, as 0.5, is allowed"
    )
    parser.add_argument("--num-gpus", type=float, default=0.0, help="of each replica, as 1 or 0.5")
    parser.add_argument(
        "--address", help="of a Ray cluster that runs already (auto: this machine's); default: one of its own, here"
    )
    return parser


def main() -> None:
    parser = ray_arguments()
    flags = vars(parser.parse_args())
    host, port, address = (flags.pop(name) for name in ("host", "port", "address"))
    if not 0 < port < 65536:
        parser.error(f"--port {port}: must be 1 to 65535")
    try:
        args = Args(any_host=not is_loopback(host), **flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = "".join(f"--{field}: ".replace("_", "-") for field in first["loc"])
        raise ValueError(name + first["msg"].removeprefix("Value error, ")) from error
    key = api_key(args.api_key_file)
    warn_of_no_key("ray_app", host, key)
    if address is None:
        args.model = check_checkpoint(args.model, assistant=True).absolute()
        start_here(host, port, None if args.api_key_file else key)
    elif key is not None and args.api_key_file is None:
        raise ValueError(f"{KEY} does not reach the machines of --address; put it into a file there (--api-key-file)")
    run_until_told(args, host, port, address or "local")


def start_here(host: str, port: int, key: str | None) -> None:
    """What must be so before Ray is imported, for one that is this program's own. ValueError: the port is taken."""
    check_place(host, port)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it tells its makers
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # its own ports on 127.0.0.1 alone
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else it keeps one in the home folder
    if key is not None:
        os.environ[KEY] = key  # where replicas read it, as `api_key` has taken it out


def run_until_told(args: Args, host: str, port: int, address: str) -> None:
    """Until SIGTERM or Ctrl-C, after which answers under way end; a second signal ends them too."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else lines of requests that look alike are left out
    serve = ray_serve()
    import ray

    from serve import ray_app  # this module under its name: replicas cannot import from __main__

    stopping = threading.Event()

    def stop(*_) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    here = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, namespace="serve", **here)
        if address == "local":
            check_room(args, ray.cluster_resources())
        options = {"host": host, "port": port}
        serve.start(http_options=options, logging_config=NO_ACCESS_LOG)
        serve.run(ray_app.app(ray_app.Args(**dict(args))), name=APPLICATION)
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, stop)
        where = "" if address == "local" else " (where Serve ran there already: at its own address)"
        print(f"api at http://{f'[{host}]' if ':' in host else host}:{port}/v1{where}", flush=True)
        stopping.wait()
        drain(serve, args.drain_seconds, all_of_it=address == "local")
    finally:
        ray.shutdown()


def check_room(args: Args, has: dict[str, float]) -> None:
    """ValueError: the machine has not what so many replicas are to have, for which Ray would wait for ever."""
    for name, each in (("CPU", args.num_cpus), ("GPU", args.num_gpus)):
        there = has.get(name, 0)
        if each * args.num_replicas > there:
            flags = f"--num-replicas {args.num_replicas} --num-{name.lower()}s {each:g}"
            raise ValueError(f"{flags}: this machine has {there:g} {name}s; ask for less")


def drain(serve, seconds: float, all_of_it: bool) -> None:
    """Takes the application down, whose replicas wait for their requests, so long. Ray waits a minute at a time.

    all_of_it: Serve itself too, with what others run on it.
    """
    for _ in range(1 + int(seconds // 60)):
        try:
            serve.delete(APPLICATION)
            if all_of_it:
                serve.shutdown()
            return
        except TimeoutError:
            continue
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    cli.run(main, "ray_app")
