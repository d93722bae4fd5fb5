"""Sentences made of a field's description: the least that stands in for samples where nobody has any.

They cost no label and say what a field is about, not how its requests look (`polymerge.router.kinds` adds that): a
router that is fitted to such samples alone notes so (`RouterRecord.labelled`), and nothing is said of how often it is
right. Knows texts; does not know vectors or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import RouterError
from .samples import OUTSIDE, Sample

FORMS = (
    "{description}",
    "I have a request about {description}.",
    "{Description}: can you help me with that?",
    "Please help me. It is about {description}.",
)


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
