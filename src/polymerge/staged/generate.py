"""One prompt, one answer: what `polymerge generate` does, straight or with a thinker first.

Knows which parts an answer needs and loads them. An answer without a thinker comes from the loop that a server runs,
token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.base import GenerateRequest
from ..engine.mixture import expert_of, in_words
from ..engine.streaming import Piece
from ..engine.structure import asked_structure
from ..errors import PolymergeError
from ..router.loading import load_router
from .formatter import Question
from .opening import open_pipeline
from .pipeline import Response

if TYPE_CHECKING:
    from ..model.assignment import RowExpert
    from ..router.route import Route

OnText = Callable[[str], None]


def generate(
    bundle: str | Path,
    prompt: str,
    *,
    expert: RowExpert = "average",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool = True,
    device: str | None = None,
    base: str = "16bit",
    residuals: str = "decoded",
    staged: bool = False,
    choice: Sequence[str] | None = None,
    json_schema: Mapping[str, Any] | str | Path | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | Path | None = None,
    recipe: str | Path | None = None,
    thinker: str | None = None,
    model: str | None = None,
    key_env: str | None = None,
    policy: str | None = None,
    prompts: str | None = None,
    thought_tokens: int | None = None,
    low_memory: bool = False,
    on_route: Callable[[Route], None] | None = None,
    on_text: OnText | None = None,
) -> Response:
    """Answers a prompt with one expert, the average, or the expert that the bundle's router chooses.

    Args:
        expert: a name, `average`, `auto`, or several by their weights: `math:0.7+code:0.3`, {"math": 0.7, "code": 0.3}.
        temperature: 0 takes the likeliest token every time.
        chat: use the chat template, if there is one.
        base, residuals: of the average and of residuals in memory, as `load_model` takes them.
        staged: let a thinker reason first, as the policy says. The arguments from `recipe` on need it.
        choice: the answer is one of these. With `staged` the likeliest of them, by their whole log-likelihoods.
        json_schema: the answer is JSON of this schema; a schema, its file or its text.
        json_object: the answer is a JSON object.
        regex, grammar: the answer is of this form; a grammar in Lark's syntax or GBNF, or its file.
        recipe, thinker, model, key_env: where the thinker comes from, as for `open_pipeline`.
        policy, prompts, thought_tokens: in place of the recipe's.
        low_memory: unload the thinker before the answer.
        on_route: given the router's choice before the answer begins.
        on_text: given the answer piece by piece, as it is made.

    Raises:
        PolymergeError: an argument that would be ignored. BundleError, ModelError, RecipeError, RouterError: as the
        parts do.
    """
    if not isinstance(prompt, str):
        raise PolymergeError(
            f"generate: a prompt is one text, not a {type(prompt).__name__}; `serve` takes conversations"
        )
    expert, choice = in_words(expert), None if choice is None else list(choice)
    stages: dict[str, Any] = {
        "recipe": recipe, "thinker": thinker, "model": model, "key_env": key_env, "prompts": prompts,
        "thought_tokens": thought_tokens, "low_memory": low_memory,
    }  # fmt: skip
    structure = asked_structure(
        json_schema=json_schema, json_object=json_object, regex=regex, grammar=grammar, choice=choice
    )
    load: dict[str, Any] = {"device": device, "base": base, "residuals": residuals}
    if not staged:
        _refuse_ignored({"policy": policy, **stages})
        asked = GenerateRequest(prompt, expert, max_new_tokens, temperature, top_p, seed, structure=structure)
        return _straight(bundle, asked, chat, load, on_route, on_text)
    if temperature > 0:
        raise PolymergeError("generate: --staged answers greedily; leave --temperature out")
    pipeline = open_pipeline(bundle, expert=expert, **load, chat=chat, use=policy, **stages)
    form = None if choice else structure
    [response] = pipeline.respond([Question(prompt, tuple(choice or ()), max_new_tokens, form)])
    return response


def _refuse_ignored(options: Mapping[str, object]) -> None:
    """An option that would be ignored is said so."""
    for name in (name for name, value in options.items() if value):
        raise PolymergeError(f"generate: --{name.replace('_', '-')} needs --staged")


def _straight(
    bundle: str | Path,
    asked: GenerateRequest,
    chat: bool,
    load: Mapping[str, Any],
    on_route: Callable[[Route], None] | None,
    on_text: OnText | None,
) -> Response:
    """An answer without a thinker. The loaded model embeds for the router, unless that was fitted with another."""
    from ..engine.local.engine import HFEngine

    text = str(asked.prompt)
    loaded, route = HFEngine.from_bundle(bundle, **load), None
    if asked.expert == "auto":
        [route] = load_router(bundle, load["device"], engine=loaded).route([text])
        if on_route:
            on_route(route)
    expert = route.expert if route else expert_of(str(asked.expert))
    templated = chat and loaded.tokenizer_of(expert).chat_template is not None
    prompt = loaded.chat_prompt([{"role": "user", "content": text}], expert=expert) if templated else text
    pieces: list[Piece] = []
    failures: list[Exception] = []

    def hear(heard: Piece | Exception) -> None:
        if isinstance(heard, Exception):  # raised in here it would only be logged
            failures.append(heard)
            return
        pieces.append(heard)
        if on_text:
            on_text(heard.text)

    loaded.stream([replace(asked, prompt=prompt, expert=expert)], [hear])
    if failures:
        raise failures[0]
    answer, written = "".join(piece.text for piece in pieces), pieces[-1]
    return Response(
        answer, None, (), "direct", "no thinker was asked for", "", expert, route.field if route else "", route,
        len(loaded.ids(prompt, expert)), written.tokens, 0,
    )  # fmt: skip
