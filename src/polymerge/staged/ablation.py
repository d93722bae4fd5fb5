"""From files of validation rows to the evidence in the bundle: what `polymerge stages` does.

Knows where rows, thinker and evidence lie; the measuring itself is `polymerge.staged.validation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import write_bytes
from .evidence import FILE, Evidence
from .forms import measure_forms
from .opening import open_pipeline
from .validation import OnField, read_questions, validate


def validate_stages(
    bundle: str | Path,
    data: Mapping[str, str | Path],
    *,
    recipe: str | Path | None = None,
    thinker: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    thought_tokens: int | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    chat: bool = True,
    device: str | None = None,
    votes: Sequence[int] | None = None,
    save: bool = True,
    progress: OnField | None = None,
) -> Evidence:
    """Measures where a thinker helps: direct answers against both versions of the prompts.

    Args:
        data: field -> its validation rows, JSON lines with prompt and answer.
        recipe, thinker, model, key_env, thought_tokens: as for `open_pipeline`.
        limit: only the first rows of every field.
        max_new_tokens: of an answer in free text.
        votes: measure forms too: free, constrained, and constrained after so many thoughts each, which vote.
        save: note it in the bundle, for the policy `auto`.
        progress: called with field, way and rows before each.

    Raises:
        PolymergeError: a file cannot be used. BundleError, ModelError, RecipeError, SourceError: as the parts do.
    """
    fields = {name: read_questions(file, limit=limit, max_new_tokens=max_new_tokens) for name, file in data.items()}
    pipeline = open_pipeline(
        bundle, recipe=recipe, thinker=thinker, model=model, key_env=key_env, device=device, expert="average",
        thought_tokens=thought_tokens,
    )  # fmt: skip
    assert pipeline.thinker  # open_pipeline gives one unless told otherwise
    measured = validate(
        pipeline.engine, pipeline.thinker, fields, settings=pipeline.settings, chat=chat, progress=progress
    )
    for name, questions in fields.items() if votes else ():
        if progress:
            progress(name, "forms", len(questions))
        measured.forms[name] = measure_forms(
            pipeline.engine, pipeline.thinker, questions, votes=votes or (), settings=pipeline.settings, chat=chat,
            expert=name if name in pipeline.engine.experts else None,
        )  # fmt: skip
    if save:
        write_bytes(Bundle.open(bundle).path / FILE, measured.to_bytes())
    return measured
