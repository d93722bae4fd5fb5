"""The deployment files say what holds: the command as it is, files that are there, extras that exist, rights."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from polymerge.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _options() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)}


def steps() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with what follows it."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in lines]


def said(word: str) -> list[str]:
    return [rest for step, rest in steps() if step == word]


@pytest.mark.parametrize("file", ["Dockerfile", "polymerge.service"])
def test_every_option_is_one_of_the_command(file: str) -> None:
    text = (DEPLOY / file).read_text()
    line = next(line for line in text.splitlines() if line.startswith(("ENTRYPOINT", "ExecStart=")))
    words = shlex.split(re.sub(r"[\[\],]", " ", line.partition("=")[2] or line.removeprefix("ENTRYPOINT")))
    assert Path(words[0]).name == "polymerge" and words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= _options()
    assert "--api-key-file" in words and "/health" in text + (DEPLOY / "polymerge-health.service").read_text()


def test_what_is_copied_is_there_and_is_all_that_the_package_is_built_of() -> None:
    copied = {source for rest in said("COPY") for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built_of = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"}
    built_of |= {Path(place).parts[0] for place in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert built_of <= copied
    assert [word for word, _ in steps()].index("COPY") < [word for word, _ in steps()].index("RUN")


def test_extras_and_python_are_those_of_the_package() -> None:
    extras = {
        name for rest in said("RUN") for group in re.findall(r'"\.\[([\w,]+)\]"', rest) for name in group.split(",")
    }
    assert extras and extras <= PROJECT["optional-dependencies"].keys()
    [image] = said("FROM")
    offered = tuple(map(int, re.findall(r"^python:(\d+)\.(\d+)-slim$", image)[0]))
    needed = tuple(map(int, re.findall(r"^>=(\d+)\.(\d+)$", PROJECT["requires-python"])[0]))
    assert offered >= needed


def test_the_server_has_the_rights_of_nobody_and_is_asked_for_its_health_where_it_listens() -> None:
    words = [word for word, _ in steps()]
    [user], [health], [port] = said("USER"), said("HEALTHCHECK"), said("EXPOSE")
    assert f"--uid {user} " in " ".join(said("RUN")) and int(user) > 0
    assert words.index("USER") > max(at for at, word in enumerate(words) if word == "RUN")
    command = json.loads(health.partition("CMD")[2])
    compile(command[2], "health", "exec")
    [served] = [param for param in _serve_parameters() if param.name == "port"]
    assert f":{port}/health" in command[2] and str(served.default) == port
    assert {"SIGTERM"} == set(said("STOPSIGNAL"))


def _serve_parameters() -> list[typer.core.TyperOption]:
    params: list[typer.core.TyperOption] = typer.main.get_command(app).commands["serve"].params  # type: ignore[attr-defined]
    return params


def test_the_service_and_its_health_check_are_asked_at_one_address() -> None:
    [served] = [param for param in _serve_parameters() if param.name == "port"]
    health = (DEPLOY / "polymerge-health.service").read_text()
    assert f"http://127.0.0.1:{served.default}/health" in health
    for unit in re.findall(r"\S+\.service", health + (DEPLOY / "polymerge-health.timer").read_text()):
        assert (DEPLOY / unit.rpartition("=")[2].strip("'")).exists(), unit
