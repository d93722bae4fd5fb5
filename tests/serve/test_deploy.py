"""The deployment files call the command as it is."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from polymerge.cli.main import app

DEPLOY = Path(__file__).parents[2] / "deploy"


def _options() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)}


@pytest.mark.parametrize("file", ["Dockerfile", "polymerge.service"])
def test_every_option_is_one_of_the_command(file: str) -> None:
    text = (DEPLOY / file).read_text()
    line = next(line for line in text.splitlines() if line.startswith(("ENTRYPOINT", "ExecStart=")))
    words = shlex.split(re.sub(r"[\[\],]", " ", line.partition("=")[2] or line.removeprefix("ENTRYPOINT")))
    assert Path(words[0]).name == "polymerge" and words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= _options()
    assert "--api-key-file" in words and "/health" in text + (DEPLOY / "polymerge-health.service").read_text()
