"""The starter kit's `Merges`, answered by a `polymerge serve` on this machine: one file without dependencies.

The kit pins an old Python and old libraries that cannot hold polymerge. Copy this file to `llm_merging/merging/` there,
and list `ServedMerges` in the kit's `main.py`; polymerge runs in an environment of its own. Python 3.8 and its standard
library are enough; torch, which the kit has, makes the tensors that it expects, and without it they are lists.

    polymerge serve bundle                     # in polymerge's environment
    POLYMERGE_URL=http://127.0.0.1:8000 python llm_merging/main.py -m served   # in the kit's
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TOKENS = 64  # of a generated answer: the kit's
SECONDS = 3600.0


class ServedMerges:
    """A bundle that a server holds, as a method of the kit.

    Attributes:
        url: of the server; by default `POLYMERGE_URL`.
        key: of the server, where it has keys; by default `POLYMERGE_KEY`.
        model: an expert's name, `average`, or `auto` for the bundle's router; by default auto where there is one.
        exact: score choices as the kit's code does to the letter.
        max_gen_len: tokens of a generated answer.
    """

    url = None  # type: str | None
    key = None  # type: str | None
    model = None  # type: str | None
    exact = False
    max_gen_len = TOKENS

    def __init__(self, name: str = "polymerge-served") -> None:
        self.name = name

    def get_name(self) -> str:
        return self.name

    def merge(self) -> None:
        """Asks the server which models it has. Raises RuntimeError where none answers there."""
        names = [one["id"] for one in self._ask("models")["data"]]
        self.model = self.model or ("auto" if "auto" in names else "average")
        if self.model not in names:
            raise RuntimeError(f"polymerge serve has no model {self.model!r}; it has {', '.join(names)}")

    def predict_multiple_choice(self, batch: Any) -> Any:
        """The best choices [rows] and all scores [rows, most choices], -inf where a row has fewer."""
        choices = [_choices(value) for value in batch["answer_choices"]]
        answers = self._answers(batch["input"], choices)
        width = max([len(answer["scores"]) for answer in answers] or [0])
        rows = [answer["scores"] + [float("-inf")] * (width - len(answer["scores"])) for answer in answers]
        return _tensors([answer["index"] for answer in answers], rows)

    def generate(self, batch: Any) -> Any:
        """Token ids of every prompt with its answer, and the answers."""
        answers = self._answers(batch["input"], None)
        return [answer["ids"] for answer in answers], [answer["text"] for answer in answers]

    def save_model(self, output_dir: str) -> None:
        """The server has the model; a note says which."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        note = json.dumps({"url": self._place(), "model": self.model})
        (folder / "served.json").write_text(note, encoding="utf-8")

    def _answers(self, texts: Any, choices: Any) -> Any:
        asked = {"model": self.model or "average", "input": [str(text) for text in texts], "choices": choices}
        return self._ask("answers", dict(asked, max_tokens=self.max_gen_len, exact=self.exact))["data"]

    def _place(self) -> str:
        return (self.url or os.environ.get("POLYMERGE_URL") or "http://127.0.0.1:8000").rstrip("/")

    def _ask(self, route: str, body: Any = None) -> Any:
        request = urllib.request.Request(f"{self._place()}/v1/{route}")
        key = self.key or os.environ.get("POLYMERGE_KEY")
        if key:
            request.add_header("Authorization", "Bearer " + key)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"polymerge serve refused: {_reason(error)}") from None
        except urllib.error.URLError as error:
            raise RuntimeError(f"no `polymerge serve` at {self._place()} ({error.reason})") from None


def _reason(error: Any) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"


def _choices(value: Any) -> Any:
    """A list as text, or any list."""
    import ast

    listed = ast.literal_eval(value) if isinstance(value, str) else value
    return [str(choice) for choice in listed]


def _tensors(best: Any, rows: Any) -> Any:
    try:
        import torch
    except ImportError:
        return best, rows
    return torch.tensor(best), torch.tensor(rows)
