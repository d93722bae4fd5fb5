"""`python -m tests.sweep`: every causal language model of the installed transformers, and docs/architectures.md.

With names of architectures only those, and nothing is written. OUTCOMES names a file of lines, one an architecture, to
which each is added as soon as it is known; a sweep that was ended goes on where it stood.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .check import CLOSE, Outcome, check
from .experts import MULTIMODAL

VARIANTS = os.environ.get("VARIANTS", "0 0.95 int4 bfloat16").split()
OUTCOMES = Path(os.environ["OUTCOMES"]) if "OUTCOMES" in os.environ else None
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
WORDS = {"0": "at rate 0", "0.95": "at 0.95", "int4": "at 0.95 in `int4`", "bfloat16": "in bfloat16"}
# Models that read images as well are tried with a text; what is stored how is the text models' own.
OF_IMAGES = [variant for variant in VARIANTS if variant in ("0", "0.95")]
IMAGES = """
Models that read images as well (`AutoModelForImageTextToText`), marked *(images)*, answer a text, merged {variants}:
{works} of the {tried} that were built small and tried work. Those that want an image are refused.
"""
HEAD = """# Architectures

**For:** knowing whether your architecture works before you merge.

Every causal language model of transformers {version} (`AutoModelForCausalLM`), as `make sweep` finds it: a tiny
random model of each, three experts in which every tensor differs, merged {variants}.
*Works* means that a batch of all experts and the average, padded, and the tokens that are generated after it with the
cache, give every row the logits of that expert's own transformers model (at rate 0, within {close:g} of the largest
logit in float32) or of its dense export, alone and together, and that transformers opens the bundle without missing or
unexpected tensors.

*Rows*: `layers`, a batch of several experts goes through the model once; `groups`, it goes through once for every
expert in it, because parameters that experts have of their own are read where rows cannot be told apart (recurrent
states, attention sinks, convolutions). A batch of one expert costs the same in both. It is decided when a bundle is
loaded, by trying the model, and stands in `model.strategy`.

*Size*: the bundle of three at rate 0.95, with embeddings and head averaged, relative to one model. These models are
64 wide: where what is not compressed (norms, biases, convolutions) is a larger share than in real ones, so is the
bundle.

{counts}
{images}
| architecture | | rows | size |
| --- | --- | --- | --- |
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """docs/architectures.md."""
    texts = [outcome for outcome in outcomes if outcome.architecture not in MULTIMODAL]
    of_images = [outcome for outcome in outcomes if outcome.architecture in MULTIMODAL]
    works, tried = _counted(texts)
    counts, images = f"{works} of the {tried} that can be built small work.", ""
    if of_images:
        works, tried = _counted(of_images)
        images = IMAGES.format(variants=_in_words(OF_IMAGES), works=works, tried=tried)
    said = {"variants": _in_words(VARIANTS), "counts": counts, "images": images}
    head = HEAD.format(version=transformers.__version__, close=CLOSE, **said)
    return head + "".join(map(_line, outcomes))


def _counted(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """(work, were tried)"""
    tried = [outcome for outcome in outcomes if outcome.status != "not built"]
    return sum(outcome.status == "works" for outcome in tried), len(tried)


def _in_words(variants: Sequence[str]) -> str:
    return ", ".join(WORDS[variant] for variant in variants)


def _line(outcome: Outcome) -> str:
    size = f"{outcome.share:.2f}" if outcome.share else ""
    detail = outcome.detail.replace("|", "\\|")
    what = "works" if outcome.status == "works" else f"{outcome.status} ({outcome.step}): {detail}"
    return f"| {outcome.architecture} | {what} | {outcome.strategy} | {size} |\n"


def outcomes_of(log: Path | None) -> dict[str, Outcome]:
    """What an earlier sweep has found, by architecture."""
    lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
    kept = {field.name for field in fields(Outcome)}
    made = (Outcome(**{key: value for key, value in json.loads(line).items() if key in kept}) for line in lines)
    return {outcome.architecture: outcome for outcome in made}


def main(names: list[str]) -> None:
    """Sweeps, a line of JSON for each. VARIANTS in the environment says which merges, by default all."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = {} if names else outcomes_of(OUTCOMES)
    for name in names or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL}):
        if name not in known:
            began = time.perf_counter()
            known[name] = check(name, variants=OF_IMAGES if name in MULTIMODAL else VARIANTS)
            line = json.dumps(asdict(known[name]) | {"seconds": round(time.perf_counter() - began, 1)})
            print(line, flush=True)
            if OUTCOMES and not names:
                with OUTCOMES.open("a", encoding="utf-8") as log:
                    log.write(f"{line}\n")
    if not names:
        PAGE.write_text(page(sorted(known.values(), key=lambda outcome: outcome.architecture)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
