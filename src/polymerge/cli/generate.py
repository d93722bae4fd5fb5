"""`polymerge generate`: let an expert answer, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PolymergeError
from .words import Base, Residuals

if TYPE_CHECKING:
    from ..router.route import Route


def generate(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder, or its hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    expert: Annotated[
        str, typer.Option(help="An expert's name, average, auto (the router chooses), or math:0.7+code:0.3.")
    ] = "average",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the chat template, if there is one.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    base: Base = "16bit",
    residuals: Residuals = "decoded",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    staged: Annotated[bool, typer.Option("--staged", help="Let a thinker reason first, as the policy says.")] = False,
    show_thoughts: Annotated[bool, typer.Option("--show-thoughts", help="Print the thought as well.")] = False,
    choice: Annotated[list[str] | None, typer.Option(help="One of the answers to choose from; give it again.")] = None,
    json_schema: Annotated[str | None, typer.Option(help="The answer is JSON of this schema (a file).")] = None,
    json_object: Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")] = False,
    regex: Annotated[str | None, typer.Option(help="The answer matches this regular expression.")] = None,
    grammar: Annotated[str | None, typer.Option(help="The answer is of this grammar, Lark or GBNF.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="With --staged: take thinker and stages from it.")] = None,
    thinker: Annotated[str | None, typer.Option(help="With --staged: a source or the URL of an endpoint.")] = None,
    model: Annotated[str | None, typer.Option(help="The endpoint's name for the model.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    policy: Annotated[str | None, typer.Option(help="With --staged: always, never or auto.")] = None,
    prompts: Annotated[str | None, typer.Option(help="With --staged: v1 or v2.")] = None,
    thought_tokens: Annotated[int | None, typer.Option(help="With --staged: at most so many a thought.")] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Unload the thinker before the answer.")] = False,
) -> None:
    """Answer a prompt with one expert (or the average), streamed to the terminal."""
    from ..staged.generate import generate as run
    from .answering import print_response, tell_route
    from .console import print_json, write
    from .logs import hush_libraries
    from .progress import waiting

    if show_thoughts and not staged:
        raise PolymergeError("generate: --show-thoughts needs --staged")
    hush_libraries()
    with waiting(f"loading {bundle}", quiet=as_json) as loaded:

        def chosen(route: Route) -> None:
            loaded()
            tell_route(route)

        def said(piece: str) -> None:
            loaded()
            write(piece)

        response = run(
            bundle, prompt, expert=expert, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            seed=seed, chat=chat, device=device, base=base, residuals=residuals, staged=staged, choice=choice or None,
            json_schema=json_schema, json_object=json_object, regex=regex, grammar=grammar,
            recipe=recipe, thinker=thinker, model=model,
            key_env=key_env, policy=policy, prompts=prompts, thought_tokens=thought_tokens, low_memory=low_memory,
            on_route=None if as_json else chosen, on_text=None if as_json else said,
        )  # fmt: skip
    if staged and as_json:
        print_json({"prompt": prompt} | response.to_json())
    elif staged:
        print_response(response, show_thoughts)
    elif as_json:
        answered = {"expert": response.expert or "average", "prompt": prompt}
        print_json(answered | {"answer": response.text, "tokens": response.tokens})
    else:
        write("\n")
