"""What is said before every question: a system text, and questions with their answers as examples.

Knows rows of JSONL and messages. With a chat template they are turns of the conversation; without, text before the
text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data.schema import AnsweredRow, read_all
from ..engine.base import Message

GAP = "\n\n"


@dataclass(frozen=True)
class Lead:
    """Attributes:
    system: of the conversation, or the first paragraph.
    examples: (question, answer) in their order.
    """

    system: str = ""
    examples: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, system: str | None, examples: str | Path | None) -> Lead:
        """From a text, and a JSONL file of rows with prompt and answer. Raises DataError."""
        rows = read_all(AnsweredRow, examples) if examples is not None else []
        return cls(system or "", tuple((row.prompt, row.answer) for row in rows))

    def __bool__(self) -> bool:
        return bool(self.system or self.examples)

    def messages(self, text: str) -> list[Message]:
        """The conversation that ends with the question."""
        said: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in self.examples:
            said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*said, {"role": "user", "content": text}]

    def before(self, text: str) -> str:
        """The question with everything before it as one text; as it is where there is nothing."""
        parts = [self.system] if self.system else []
        parts += [f"{question}\n{answer}" for question, answer in self.examples]
        return GAP.join([*parts, text])
