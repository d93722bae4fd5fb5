"""What `polymerge generate --staged` does: one question through both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PolymergeError


def answer_staged(
    bundle: Path,
    prompt: str,
    *,
    choices: list[str],
    max_new_tokens: int,
    temperature: float,
    low_memory: bool,
    show_thoughts: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Thinks, answers and prints. The options are those of `open_pipeline`."""
    from ..staged import Question
    from ..staged.opening import open_pipeline
    from .console import print_json, print_response

    if temperature > 0:
        raise PolymergeError("generate: --staged answers greedily; leave --temperature out")
    pipeline = open_pipeline(bundle, low_memory=low_memory, **options)
    response = pipeline.respond([Question(prompt, tuple(choices), max_new_tokens)])[0]
    if as_json:
        print_json({"prompt": prompt} | response.to_json())
    else:
        print_response(response, show_thoughts)


def refuse_without_staged(**options: Any) -> None:
    """An option that would be ignored is said so."""
    given = next((name for name, value in options.items() if value), None)
    if given:
        raise PolymergeError(f"generate: --{given.replace('_', '-')} needs --staged")
