"""Free, constrained, and think-then-constrain with votes, on the demo's experts and on their average:

    polymerge demo                                 # once: three experts of SmolLM2-135M in demo-out/bundle
    python benchmarks/stages.py demo-out/bundle

Writes held-out rows of the demo's skills as JSON lines (a schema for orders, the number that counts for sums, four
commands to choose from) and runs `polymerge stages` on them with 1, 4 and 8 thoughts. A field of an expert's name is
answered by that expert, the others by the average. What it prints is that command's own table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polymerge.demo.skills import SkillExample, demo_skills

VOTES = (1, 4, 8)
ANSWERED_BY_THE_AVERAGE = {"orders": "json"}


def main() -> None:
    """Writes the rows, runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--rows", type=int, default=6, help="of each field")
    parser.add_argument("--fields", nargs="+", default=["json", "math", "shell", *ANSWERED_BY_THE_AVERAGE])
    parser.add_argument("--thought-tokens", type=int, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_rows(Path(folder), given.rows)
        pairs = [f"{name}={file}" for name, file in files.items() if name in given.fields]
        votes = [word for count in VOTES for word in ("--votes", str(count))]
        command = ["stages", given.bundle, *pairs, *votes, "--thought-tokens", str(given.thought_tokens)]
        command += ["--max-new-tokens", "24", "--no-chat", "--no-save"]
        sys.exit(subprocess.run([sys.executable, "-m", "polymerge", *command], check=False).returncode)


def write_rows(folder: Path, count: int) -> dict[str, Path]:
    """Field -> its file."""
    skills = {skill.name: skill.test for skill in demo_skills(train=1, test=count)}
    rows = {name: [row_of(name, one, examples) for one in examples] for name, examples in skills.items()}
    rows |= {field: rows[skill] for field, skill in ANSWERED_BY_THE_AVERAGE.items()}
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    return files


def row_of(skill: str, example: SkillExample, others: Sequence[SkillExample]) -> dict[str, Any]:
    """A row whose answer has a form. Prompts end as the experts were trained to read them."""
    row: dict[str, Any] = {"prompt": f"{example.prompt}\n", "answer": example.answer}
    if skill == "json":
        properties = {name: {"type": "string" if name == "name" else "integer"} for name in json.loads(example.answer)}
        form = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        return row | {"schema": form}
    if skill == "math":
        return row | {"final": example.answer.rpartition("= ")[2]}
    place = [one.answer for one in others].index(example.answer)
    return row | {"choices": sorted({others[(place + n) % len(others)].answer for n in range(4)})}


if __name__ == "__main__":
    main()
