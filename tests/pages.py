"""README.md and docs/ as commands: which blocks there are, and what stands in them. Knows nothing of how they run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Blocks that show what is printed, or what lies in a folder: by the beginning of their first line.
SHOWN = {
    "README.md": [" exact match on held-out requests"],
    "format.md": ["bundle/"],
    "scale.md": ["answering    about 37.2 GB"],
    "cli.md": ["polymerge "],  # the usage of each command, made from its --help (tests/test_docs.py)
}
# Lines that only show what a command printed stand in its block, below a line that begins with "$ ".


def blocks_of(page: Path) -> list[str]:
    """The page's blocks of commands or of what they print: those of no language, or of a shell's."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for language, block in fenced if language in ("", "console", "bash", "sh")]


def commands_of(block: str) -> Iterator[str]:
    """Whole commands: a backslash, an open quotation or a text to read join lines. With a "$ " others are output."""
    lines = block.splitlines()
    marked = any(line.startswith("$ ") for line in lines)
    while lines:
        text = lines.pop(0)
        if (marked and not text.startswith("$ ")) or not text.strip() or text.lstrip().startswith("#"):
            continue
        text = text.removeprefix("$ ")
        while _open(text):
            text += "\n" + lines.pop(0)
        if ends := re.search(r"<<'(\w+)'", text):
            count = lines.index(ends[1]) + 1
            text, lines = "\n".join([text, *lines[:count]]), lines[count:]
        yield text.strip()


def _open(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return text.endswith("\\")


def inline_of(page: Path) -> list[str]:
    """The commands inside the page's sentences. A verb's name alone is none, nor are its options alone."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    quoted = [" ".join(words.split()) for words in re.findall(r"`(polymerge [^`]+)`", text)]
    return [command for command in quoted if len(command.split()) > 2 and not command.split()[2].startswith("-")]


def shown(page: Path, block: str) -> bool:
    return any(block.startswith(beginning) for beginning in SHOWN.get(page.name, []))


def all_commands() -> list[tuple[Path, str]]:
    """Every page's commands, in order."""
    blocks = [(page, block) for page in PAGES for block in blocks_of(page) if not shown(page, block)]
    return [(page, command) for page, block in blocks for command in commands_of(block)]
