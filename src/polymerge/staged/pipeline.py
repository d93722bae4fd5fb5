"""A question's way: route, decide whether to think, think, answer.

All thoughts of a batch come before all its answers, so that thinker and formatter need not run at once. A thought that
does not come costs nothing but the gain it might have brought: the question is answered directly, and the response
says so and why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..data.shown import shortened, table
from ..engine.base import Engine
from ..recipe.response import PromptVersion, StageSettings
from ..router.route import Route, Routes
from .asking import AskingEvidence
from .evidence import Evidence
from .formatter import Answer, FormatRequest, Formatter, Question
from .lead import Lead
from .templates import Templates
from .thinker import Thinker
from .thought import Thought

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

VERSIONS: tuple[PromptVersion, ...] = ("v1", "v2")


@dataclass(frozen=True)
class Step:
    """What will happen to one question.

    Attributes:
        route: None where no router was asked.
        version: of the prompts with which it is thought about; None for a direct answer.
        reason: why it is answered directly, or why it is thought about.
    """

    question: Question
    expert: RowExpert
    field: str
    route: Route | None
    version: PromptVersion | None
    reason: str

    def direct(self, reason: str) -> Step:
        """The same without a thought."""
        return replace(self, version=None, reason=reason)


@dataclass(frozen=True)
class Response:
    """An answer, the thought behind it, and what both cost.

    Attributes:
        index, scores: of the choices; None and () for free text.
        stage: "staged" where a thought was used, otherwise "direct".
        reason: of the stage.
        thought: what the thinker wrote; empty for a direct answer.
        prompt_tokens, tokens: read and written by both stages together, thinker_tokens: written by the thinker alone.
        finish: `length` where the answer ran out of tokens or of time.
    """

    text: str
    index: int | None
    scores: tuple[float, ...]
    stage: Literal["direct", "staged"]
    reason: str
    thought: str
    expert: RowExpert
    field: str
    route: Route | None
    prompt_tokens: int
    tokens: int
    thinker_tokens: int
    finish: Literal["stop", "length"] = "stop"

    def __repr__(self) -> str:
        expert = self.expert or "average"
        return f"Response({shortened(self.text)!r} by {expert}, {self.stage}, {self.tokens} tokens)"

    def _repr_html_(self) -> str:
        rows = {"expert": self.expert or "average", "stage": f"{self.stage} ({self.reason})", "text": self.text}
        return table("Response", rows | ({"thought": self.thought} if self.thought else {}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Pipeline:
    """Both stages over one engine.

    Args:
        engine: the formatter's, a bundle's.
        thinker: None answers everything directly.
        router: chooses every question's expert and field.
        expert: without a router, the expert of all questions; its name is then their field.
        evidence: of `polymerge stages`, for the policy `auto`.
        chat: put prompts into the formatter's chat template.
        low_memory: unload the thinker as soon as its thoughts are there.
        lead: what the formatter is told before every prompt: a system text, examples.
        asking: how direct answers are asked for, by field, in the place of `chat` and `lead`.

    Raises:
        RecipeError: a template of the settings cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        settings: StageSettings | None = None,
        *,
        thinker: Thinker | None = None,
        router: Routes | None = None,
        expert: RowExpert = None,
        evidence: Evidence | None = None,
        chat: bool = True,
        low_memory: bool = False,
        lead: Lead | None = None,
        asking: AskingEvidence | None = None,
    ) -> None:
        self.settings = settings or StageSettings()
        self.engine, self.thinker, self.low_memory = engine, thinker, low_memory
        self._router, self._expert, self._chat, self._lead = router, expert, chat, lead or Lead()
        self._asking = asking
        self.templates = {version: Templates(version, self.settings.templates) for version in VERSIONS}
        self._formatter = Formatter(engine, length_norm=self.settings.length_norm, chat=chat, lead=lead)
        self._evidence, self._mismatch = self._checked(evidence)

    @property
    def routes(self) -> bool:
        """Whether a router chooses the experts."""
        return self._router is not None

    def respond(self, questions: Sequence[Question], *, deadline: float | None = None) -> list[Response]:
        """One response a question, in their order.

        Args:
            deadline: a time of `time.monotonic()` after which no thought is begun; `thought_seconds` may make it
                earlier.

        Raises:
            ModelError: an unknown expert. SourceError: the thinker is not there.
        """
        steps = self.steps(questions)
        if self.settings.thought_seconds is not None:
            latest = time.monotonic() + self.settings.thought_seconds
            deadline = latest if deadline is None else min(latest, deadline)
        thoughts = self.think(steps, deadline=deadline)
        if self.low_memory and self.thinker:
            self.thinker.unload()
        return self.answer(steps, thoughts)

    def steps(self, questions: Sequence[Question]) -> list[Step]:
        """Routes and decides."""
        if self._router is None:
            field = self._expert if isinstance(self._expert, str) else ""
            return [self._decided(question, self._expert, field, None) for question in questions]
        routes = self._router.route([question.text for question in questions]) if questions else []
        return [
            self._decided(question, route.expert, route.field, route)
            for question, route in zip(questions, routes, strict=True)
        ]

    def think(
        self,
        steps: Sequence[Step],
        *,
        deadline: float | None = None,
        seed: int | None = None,
        tokens: int | None = None,
    ) -> list[Thought | None]:
        """One thought a step, None for those that are answered directly, of at most so many tokens, which by default
        the settings say. With a seed the thoughts are drawn."""
        wanted = [number for number, step in enumerate(steps) if step.version]
        thoughts: list[Thought | None] = [None] * len(steps)
        if wanted and self.thinker:
            prompts = [self._prompt("think", steps[number]) for number in wanted]
            tokens = tokens or self.settings.thought_tokens
            drawn = {} if seed is None else {"seed": seed}
            written = self.thinker.think(prompts, max_tokens=tokens, deadline=deadline, **drawn)
            for number, thought in zip(wanted, written, strict=True):
                thoughts[number] = thought
        return thoughts

    def answer(
        self, steps: Sequence[Step], thoughts: Sequence[Thought | None], *, deadline: float | None = None
    ) -> list[Response]:
        """The responses; a step without a usable thought is answered directly. Texts are over at the deadline."""
        taken, requests = [], []
        for step, thought in zip(steps, thoughts, strict=True):
            step, request = self._format_request(step, thought)
            taken.append(step)
            requests.append(request)
        answers = self._formatter.answer(requests, deadline=deadline)
        return [_response(*parts) for parts in zip(taken, thoughts, answers, strict=True)]

    def asked(self, step: Step) -> str | None:
        """The way of asking that validation took for a direct answer; None where it is as told."""
        return self._asking.best(step.field) if self._asking and step.version is None else None

    def work(self, steps: Sequence[Step]) -> list[tuple[int, int]]:
        """Tokens that each direct answer reads and at most writes; a thought's are apart."""
        return [self._formatter.work(self._format_request(step.direct(""), None)[1]) for step in steps]

    def _decided(self, question: Question, expert: RowExpert, field: str, route: Route | None) -> Step:
        version, reason = self._decision(field, route)
        return Step(question, expert, field, route, version, reason)

    def _decision(self, field: str, route: Route | None) -> tuple[PromptVersion | None, str]:
        settings = self.settings
        use = settings.fields.get(field, settings.use)
        if self.thinker is None:
            return None, "there is no thinker"
        if use == "never":
            return None, "the policy is never"
        if use == "always":
            return settings.prompts, "the policy is always"
        if route is not None and route.fallback:
            return None, "the router sent it to the fallback"
        if route is not None and route.confidence < settings.min_confidence:
            return None, f"the router's confidence {route.confidence:.2f} is under {settings.min_confidence:g}"
        if self._evidence is None:
            return None, self._mismatch
        if not field:
            return None, "no field is known: name an expert, or let the router choose"
        measured = self._evidence.fields.get(field)
        if measured is None or measured.best == "direct":
            return None, f"validation shows no gain from thinking in field {field!r}"
        gain = measured.scores[measured.best] - measured.scores["direct"]
        return measured.best, f"{measured.best} gained {gain:+.3f} in field {field!r} on validation data"

    def _checked(self, evidence: Evidence | None) -> tuple[Evidence | None, str]:
        if evidence is None or not evidence.fields:
            return None, "nothing shows yet that thinking helps here; `polymerge stages` measures it"
        measured = {
            "bundle": (evidence.bundle, self.engine.fingerprint),
            "thinker": (evidence.thinker, self.thinker.fingerprint if self.thinker else ""),
            "prompts": (evidence.prompts, self.digest),
        }
        changed = [name for name, (then, now) in measured.items() if then != now]
        if changed:
            return None, f"`polymerge stages` measured another {' and '.join(changed)}"
        return evidence, ""

    def identity(self) -> dict[str, Any]:
        """All that the responses depend on, as plain data."""
        return {
            "engine": self.engine.fingerprint,
            "settings": self.settings.model_dump(mode="json"),
            "thinker": self.thinker.fingerprint if self.thinker else None,
            "prompts": self.digest,
            "expert": self._expert,
            "router": getattr(self._router, "fingerprint", self._router is not None),
            "evidence": self._evidence.model_dump(mode="json") if self._evidence else None,
            "chat": self._chat,
            **({"lead": asdict(self._lead)} if self._lead else {}),
            **({"asking": self._asking.model_dump(mode="json")} if self._asking else {}),
        }

    @property
    def digest(self) -> str:
        """Of all prompts and of what else the gain of a thought depends on."""
        settings = self.settings
        prompts = [templates.digest for templates in self.templates.values()]
        return "-".join(
            [*prompts, str(settings.thought_tokens), settings.length_norm, "chat" if self._chat else "bare"]
        )

    def _prompt(self, stage: Literal["think", "format"], step: Step, thought: str = "") -> str:
        templates = self.templates[step.version or self.settings.prompts]
        question = step.question
        return templates.render(
            stage, question=question.text, choices=question.choices, field=step.field, thought=thought
        )

    def _format_request(self, step: Step, thought: Thought | None) -> tuple[Step, FormatRequest]:
        asking = self._asking.way(step.field) if self._asking else None
        direct = FormatRequest(step.question, step.question.text, step.expert, asking=asking)
        if step.version is None:
            return step, direct
        if thought is None or not thought.usable:
            return step.direct(thought.error if thought and thought.error else "the thinker wrote nothing"), direct
        prompt = self._prompt("format", step, thought.text)
        # v2 asks whether the thought's answer and the direct one agree: choices are scored after both prompts
        second = step.question.text if step.version == "v2" and step.question.scored else None
        request = FormatRequest(step.question, prompt, step.expert, second)
        if not self._formatter.fits(request):
            return step.direct("question and thought do not fit the model's context"), direct
        return step, request


def _response(step: Step, thought: Thought | None, answer: Answer) -> Response:
    spent = thought or Thought("")
    return Response(
        text=answer.text,
        index=answer.index,
        scores=answer.scores,
        stage="staged" if step.version else "direct",
        reason=step.reason,
        thought=spent.text if step.version else "",
        expert=step.expert,
        field=step.field,
        route=step.route,
        prompt_tokens=answer.prompt_tokens + spent.prompt_tokens,
        tokens=answer.tokens + spent.tokens,
        thinker_tokens=spent.tokens,
        finish=answer.finish,
    )
