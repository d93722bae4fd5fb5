"""Ways of asking for a direct answer: bare or in the chat template, with or without a system text and examples.

Knows the ways that there are, and what validation rows said about them, by field. Does not know how answers are judged
(`polymerge.staged.validation`) nor how a prompt becomes tokens (`polymerge.staged.formatter`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict

from .lead import Lead

BARE = "bare"  # the competition's own, and the one that another must beat
ALL = ""  # the name of all fields' rows together, for a field that was not measured


@dataclass(frozen=True)
class Asking:
    """One way: whether prompts stand in the chat template, and what is said before them."""

    chat: bool = False
    lead: Lead = field(default_factory=Lead)


def ways_of_asking(lead: Lead) -> dict[str, Asking]:
    """Every way by its name, the bare one first: with and without each part of the lead, and the chat template."""
    leads = {"": Lead()}
    if lead.examples:
        leads["few-shot"] = Lead(examples=lead.examples)
    if lead.system:
        leads |= {_name(name, "system"): replace(one, system=lead.system) for name, one in leads.items()}
    forms = {BARE: False, "chat": True}
    return {_name(form, name): Asking(chat, one) for name, one in leads.items() for form, chat in forms.items()}


def _name(*parts: str) -> str:
    return " + ".join(filter(None, parts))


class AskedField(BaseModel):
    """One field: mean score of every way of asking over `rows` validation rows, and the way to take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    scores: dict[str, float]
    best: str


class AskingEvidence(BaseModel):
    """What validation rows said about the ways of asking, with the texts that were tried.

    Attributes:
        fields: field -> its figures; under `ALL` those of all rows together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    fields: dict[str, AskedField]

    def best(self, area: str) -> str:
        """The name of the way that a field deserves; one that was not measured deserves that of all rows."""
        return self.fields.get(area, self.fields[ALL]).best

    def way(self, area: str) -> Asking:
        """As `best`, the way itself."""
        return ways_of_asking(Lead(self.system, self.examples))[self.best(area)]
