"""What stands in for samples where nobody has any: sentences made of a field's description, and what the model writes
when it is asked for messages about it.

They cost no label and say what a field is about, not how its requests look: a router that is fitted to them alone
notes so (`RouterRecord.labelled`), and nothing is said of how often it is right. Knows texts and prompts; does not know
vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..engine.base import Engine, GenerateRequest, Prompt
from ..errors import RouterError
from .samples import OUTSIDE, Sample

FORMS = (
    "{description}",
    "I have a request about {description}.",
    "{Description}: can you help me with that?",
    "Please help me. It is about {description}.",
)
# What the model goes on with, and what it is asked for; each is drawn DRAWS times (docs/log-router.md).
BEGUN = "Ten different messages that people sent to an assistant. All of them are about {description}.\n\n1. "
ASKED = (
    "Write five short, different messages that a user could send about this topic: {description}. One message a line."
)
DRAWS, TOKENS = 3, 110
TEMPERATURE, TOP_P = 0.8, 0.95


def by_name(experts: Sequence[str]) -> dict[str, str]:
    """Experts' names in words: all that is known of them."""
    return {name: " ".join(name.replace("_", " ").replace("-", " ").split()) for name in experts}


def described_samples(descriptions: Mapping[str, str]) -> list[Sample]:
    """A sample of every form for every field. Raises RouterError for a field or description that cannot be used."""
    samples = []
    for field, words in descriptions.items():
        if not words.strip():
            raise RouterError(f"field {field!r} has an empty description")
        if field == OUTSIDE:
            raise RouterError(
                f"a field cannot be called {OUTSIDE!r}: that is the name of texts that belong to no field"
            )
        text = words.strip()
        named = {"description": text, "Description": text[0].upper() + text[1:]}
        samples += [Sample(form.format(**named), field) for form in FORMS]
    return samples


def written_samples(engine: Engine, descriptions: Mapping[str, str]) -> list[Sample]:
    """What the engine's average writes about every field, as long as it likes. The same for the same engine."""
    requests, fields = [], []
    for field, words in descriptions.items():
        begun = BEGUN.format(description=words.strip())
        asked = engine.chat_prompt([{"role": "user", "content": ASKED.format(description=words.strip())}])
        for prompt in (begun, asked):
            requests += [_draw(prompt, seed) for seed in range(DRAWS)]
            fields += [field] * DRAWS
    texts = [answer.text.strip() for answer in engine.generate(requests)]
    return [Sample(text, field) for text, field in zip(texts, fields, strict=True) if text]


def _draw(prompt: Prompt, seed: int) -> GenerateRequest:
    return GenerateRequest(prompt, max_new_tokens=TOKENS, temperature=TEMPERATURE, top_p=TOP_P, seed=seed)
