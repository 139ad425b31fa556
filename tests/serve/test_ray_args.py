"""What starts replicas without Ray at hand: arguments, their mistakes, and the files of serve/deploy/."""

from __future__ import annotations

import configparser
import json
import re
import shlex

import pytest
import yaml
from pydantic import ValidationError

from serve import api, ray_app
from serve.replica import Changes


def test_arguments_have_the_defaults_of_the_flags(tmp_path):
    flags = vars(api.arguments("api", "").parse_args(["--model", str(tmp_path)]))
    args = dict(ray_app.Args(model=tmp_path))
    assert {name: args[name] for name in flags if name not in ("host", "port")} == {
        name: value for name, value in flags.items() if name not in ("host", "port")
    }


def test_arguments_are_read_from_words(tmp_path):
    """As `serve run` hands them over."""
    args = ray_app.Args.model_validate({"model": str(tmp_path), "num_replicas": "2", "num_gpus": "0.5", "bits": "4"})
    assert (args.num_replicas, args.num_gpus, args.bits) == (2, 0.5, 4)


@pytest.mark.parametrize(
    "given, names",
    [
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"time_limit": 0}, "time limit"),
        ({"max_rows": 0}, "max_rows"),
        ({"bits": 3}, "bits"),
        ({"target_ongoing_requests": 4}, "target_ongoing_requests has no meaning without max_replicas"),
        ({"drain_seconds": float("inf")}, "drain_seconds"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_a_mistake_is_found_before_a_replica_starts(tmp_path, given, names):
    with pytest.raises(ValidationError, match=names):
        ray_app.Args(model=tmp_path, **given)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--num-replicas", "0"], "--num-replicas: "),
        (["--num-replicas", "2", "--max-replicas", "1"], "max_replicas must be at least num_replicas 2"),
        (["--port", "0"], "--port 0: "),
        (["--address", "auto"], "does not reach the machines of --address"),
        ([], "nothing-here"),
    ],
)
def test_a_mistake_is_one_line(repository, tmp_path, run_script, monkeypatch, flags, says):
    monkeypatch.setenv(api.KEY, "a-key")
    done = run_script(repository / "serve" / "ray_app.py", "--model", tmp_path / "nothing-here", *flags)
    assert done.returncode and done.stderr.count("\n") == 1 and done.stderr.startswith("ray_app: error: ")
    assert says in done.stderr


def test_more_than_the_machine_has(tmp_path):
    args = ray_app.Args(model=tmp_path, num_replicas=3, num_cpus=0.5, num_gpus=0.5)
    ray_app.check_room(args, {"CPU": 1.5, "GPU": 2})
    with pytest.raises(ValueError, match="--num-replicas 3 --num-cpus 0.5: this machine has 1 CPUs"):
        ray_app.check_room(args, {"CPU": 1, "GPU": 2})
    with pytest.raises(ValueError, match="--num-gpus 0.5: this machine has 0 GPUs"):
        ray_app.check_room(args, {"CPU": 2})


def test_the_configuration_file_has_arguments_that_there_are(repository):
    text = (repository / "serve" / "deploy" / "ray.yaml").read_text()
    for version in (text, re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)):  # and with what it leaves out
        (application,) = yaml.safe_load(version)["applications"]
        module, _, name = application["import_path"].partition(":")
        assert (module, getattr(ray_app, name)) == ("serve.ray_app", ray_app.app)
        assert ray_app.Args(**application["args"]).num_replicas == 2
        assert Changes(**application["deployments"][0]["user_config"]).time_limit == 120


def test_the_files_start_what_there_is(repository):
    """Container, compose and systemd name programs and flags that exist."""
    folder = repository / "serve" / "deploy"
    container = (folder / "Containerfile").read_text()
    commands = [json.loads(found) for found in re.findall(r"^CMD (\[.*\])$", container, re.MULTILINE)]
    commands += [
        service["command"]
        for service in yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
        if "command" in service
    ]
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(folder / "llava-drip.service")
    commands.append(shlex.split(unit["Service"]["ExecStart"])[2:])
    assert [command[0] for command in commands] == ["serve.api", "serve.ray_app", "serve.api"]
    for program, *flags in commands:
        parser = ray_app.ray_arguments() if program == "serve.ray_app" else api.arguments("api", "")
        assert parser.parse_args(flags).api_key_file is not None
    for probe in re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", container, re.MULTILINE):
        compile(json.loads(probe)[2], "HEALTHCHECK", "exec")
