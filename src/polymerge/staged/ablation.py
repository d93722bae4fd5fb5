"""From files of validation rows to the evidence in the bundle: what `polymerge stages` does.

Knows where rows, thinker and evidence lie; the measuring itself is `polymerge.staged.validation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.files import write_bytes
from ..engine.base import Engine
from ..errors import RecipeError
from .evidence import FILE, Evidence
from .forms import measure_forms
from .lead import Lead
from .opening import open_pipeline
from .pipeline import Pipeline
from .validation import AnsweredQuestion, OnField, read_questions, validate, validate_asking


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
    think: bool = True,
    asking: bool = False,
    few_shot: str | Path | None = None,
    system: str | None = None,
    save: bool = True,
    progress: OnField | None = None,
) -> Evidence:
    """Measures where a thinker helps: direct answers against both versions of the prompts; and how to ask.

    Args:
        data: field -> its validation rows, JSON lines with prompt and answer.
        recipe, thinker, model, key_env, thought_tokens: as for `open_pipeline`.
        limit: only the first rows of every field.
        max_new_tokens: of an answer in free text.
        votes: measure forms too: free, constrained, and constrained after so many thoughts each, which vote.
        think: off, thinking is not measured, and no thinker loaded.
        asking: measure the ways of asking too: bare, in the chat template, and both with what is said before.
        few_shot: JSONL rows with prompt and answer, and system: a text, to be said before every question of `asking`.
        save: note it in the bundle, for what is `auto`; what is there and was not measured now stays.
        progress: called with field, way and rows before each.

    Raises:
        PolymergeError: a file cannot be used. BundleError, ModelError, RecipeError, SourceError: as the parts do.
    """
    if not (think or asking):
        raise RecipeError(
            "stages: neither thinking nor asking is to be measured; leave --no-think out, or give --asking"
        )
    if (few_shot or system) and not asking:
        raise RecipeError("stages: --few-shot and --system are ways of asking; give --asking too")
    lead = Lead.read(system, few_shot)
    fields = {name: read_questions(file, limit=limit, max_new_tokens=max_new_tokens) for name, file in data.items()}
    pipeline = open_pipeline(
        bundle, recipe=recipe, staged=think, thinker=thinker, model=model, key_env=key_env, device=device,
        expert="average", thought_tokens=thought_tokens,
    )  # fmt: skip
    folder = Bundle.open(bundle).path
    earlier = _earlier(folder, pipeline.engine)
    measured = _thinking(pipeline, fields, votes or (), chat, progress) if think else earlier
    asked = validate_asking(pipeline.engine, fields, lead, progress=progress) if asking else earlier.asking
    measured = measured.model_copy(update={"asking": asked})
    if save:
        write_bytes(folder / FILE, measured.to_bytes())
    return measured


def _earlier(folder: Path, engine: Engine) -> Evidence:
    """What is noted of this very bundle; else nothing."""
    noted = Evidence.load(folder)
    if noted and noted.bundle == engine.fingerprint:
        return noted
    return Evidence(bundle=engine.fingerprint, thinker="", prompts="", fields={})


def _thinking(
    pipeline: Pipeline,
    fields: Mapping[str, Sequence[AnsweredQuestion]],
    votes: Sequence[int],
    chat: bool,
    progress: OnField | None,
) -> Evidence:
    """Direct answers against both versions of the prompts, and the forms where there are votes."""
    assert pipeline.thinker  # open_pipeline gives one unless told otherwise
    measured = validate(
        pipeline.engine, pipeline.thinker, fields, settings=pipeline.settings, chat=chat, progress=progress
    )
    for name, questions in fields.items() if votes else ():
        if progress:
            progress(name, "forms", len(questions))
        measured.forms[name] = measure_forms(
            pipeline.engine, pipeline.thinker, questions, votes=votes, settings=pipeline.settings, chat=chat,
            expert=name if name in pipeline.engine.experts else None,
        )  # fmt: skip
    return measured
