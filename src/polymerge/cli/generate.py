"""`polymerge generate`: let an expert answer, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..model import MixedModel
    from ..model.assignment import RowExpert
    from ..router import Route


def generate(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    prompt: Annotated[str, typer.Argument(help="What to answer.")],
    expert: Annotated[str, typer.Option(help="An expert's name, average, or auto: the router chooses.")] = "average",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Use the chat template, if there is one.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; by default the GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
    staged: Annotated[bool, typer.Option("--staged", help="Let a thinker reason first, as the policy says.")] = False,
    show_thoughts: Annotated[bool, typer.Option("--show-thoughts", help="Print the thought as well.")] = False,
    choice: Annotated[list[str] | None, typer.Option(help="With --staged: one of the answers to choose from.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="With --staged: take thinker and stages from it.")] = None,
    thinker: Annotated[str | None, typer.Option(help="With --staged: a source or the URL of an endpoint.")] = None,
    endpoint_model: Annotated[str | None, typer.Option("--model", help="The endpoint's name for the model.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    policy: Annotated[str | None, typer.Option(help="With --staged: always, never or auto.")] = None,
    prompts: Annotated[str | None, typer.Option(help="With --staged: v1 or v2.")] = None,
    thought_tokens: Annotated[int | None, typer.Option(help="With --staged: at most so many a thought.")] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Unload the thinker before the answer.")] = False,
) -> None:
    """Answer a prompt with one expert (or the average), streamed to the terminal."""
    import torch
    from rich.markup import escape
    from transformers import TextStreamer

    from ..model import load_model
    from .answering import answer_staged, refuse_without_staged
    from .console import err, hush_libraries, print_json

    hush_libraries()
    if staged:
        answer_staged(
            bundle, prompt, choices=choice or [], max_new_tokens=max_new_tokens, temperature=temperature,
            low_memory=low_memory, show_thoughts=show_thoughts, as_json=as_json, recipe=recipe, thinker=thinker,
            model=endpoint_model, key_env=key_env, expert=expert, device=device, chat=chat, use=policy, prompts=prompts,
            thought_tokens=thought_tokens,
        )  # fmt: skip
        return
    refuse_without_staged(
        show_thoughts=show_thoughts, choice=choice, recipe=recipe, thinker=thinker, model=endpoint_model,
        key_env=key_env, policy=policy, prompts=prompts, thought_tokens=thought_tokens, low_memory=low_memory,
    )  # fmt: skip
    model = load_model(bundle, device=device)
    chosen: RowExpert = expert
    if expert == "auto":
        found = _routed(model, prompt, device)
        chosen = found.expert
        if not as_json:
            err.print(f"[dim]expert {chosen or 'average'}: {escape(found.reason)}[/]", soft_wrap=True)
    model.check_experts(chosen)
    tokenizer = model.tokenizer
    templated = chat and tokenizer.chat_template is not None
    text = prompt
    if templated:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # a rendered template holds its special tokens already
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not templated).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, experts=chosen, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    if as_json:
        new = output[0, inputs["input_ids"].shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"expert": chosen or "average", "prompt": prompt, "answer": answer, "tokens": len(new)})


def _routed(model: MixedModel, prompt: str, device: str | None) -> Route:
    """Where the bundle's router sends the prompt. The loaded model embeds for it, unless it was fitted with another."""
    from ..engine.local.engine import HFEngine
    from ..router.opening import open_router

    def own() -> HFEngine:
        return HFEngine(model, model.tokenizer, fingerprint=model.bundle.digest)

    def other(source: str) -> HFEngine:
        return HFEngine.from_checkpoint(source, device=device)

    [found] = open_router(model.bundle, own, other).route([prompt])
    return found
