"""Writes docs/cli.md from the commands themselves (`make docs`); a test holds that the page is up to date."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import typer

from polymerge.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# The commands

**For:** looking up every command and option.

Written by `make docs` from the commands' own `--help`. Results go to standard output, progress and errors to standard
error. Every command exits with 0 when it did what was asked, with 2 and one line for bad input; `merge` exits with 3
when the bundle is whole but a tensor is over the recipe's `max_error`.
"""


def page() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    commands = getattr(group, "commands", {})
    return HEAD + "".join(_command(name, command) for name, command in _flat(commands))


def _flat(commands: Mapping[str, object], before: str = "") -> Iterator[tuple[str, object]]:
    """(full name, command), those of a group in its place."""
    for name, command in commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield before + name, command
        else:
            yield from _flat(inner, f"{before}{name} ")


def _command(name: str, command: object) -> str:
    params = [param for param in getattr(command, "params", []) if param.name != "help"]
    arguments = [param for param in params if param.param_type_name == "argument"]
    usage = " ".join(["polymerge", name, *(_argument(param) for param in arguments), "[options]"])
    lines = [
        f"\n## {name}\n",
        f"{getattr(command, 'help', '')}\n",
        f"```\n{usage}\n```\n",
        "| | | default |",
        "|---|---|---|",
    ]
    for param in params:
        named = param.param_type_name == "option"
        flags = ", ".join(f"`{opt}`" for opt in (*param.opts, *param.secondary_opts))
        shown = flags if named else _argument(param).replace("|", "\\|")
        default = "" if param.required or param.default in (None, False) or not named else f"`{param.default}`"
        lines.append(f"| {shown} | {param.help or ''} | {default} |")
    return "\n".join(lines) + "\n"


def _argument(param: object) -> str:
    return str(getattr(param, "metavar", None) or getattr(param, "name", "").upper())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
