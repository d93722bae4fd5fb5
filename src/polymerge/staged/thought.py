"""What a thinker gives back: a thought, or why there is none.

Knows nothing of thinkers (`polymerge.staged.thinker`, `polymerge.staged.endpoint`) nor of who reads thoughts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OUT_OF_TIME = "the time for thoughts was over"


@dataclass(frozen=True)
class Thought:
    """What the thinker wrote to one prompt.

    Attributes:
        tokens, prompt_tokens: as the thinker counts them.
        finish: "stop", "length" (cut at the budget of tokens, still of use) or "failed", with the reason in `error`.
    """

    text: str
    prompt_tokens: int = 0
    tokens: int = 0
    finish: Literal["stop", "length", "failed"] = "stop"
    error: str = ""

    @property
    def usable(self) -> bool:
        return self.finish != "failed" and bool(self.text.strip())


def failed(reason: str) -> Thought:
    """No thought, and why."""
    return Thought("", finish="failed", error=" ".join(reason.split())[:300])
