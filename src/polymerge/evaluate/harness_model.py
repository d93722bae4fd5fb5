"""lm-evaluation-harness's model `polymerge`: an engine whose requests go to the expert that a mode chooses.

Knows the harness's three kinds of request and how it wants texts to be cut into tokens. Does not know tasks, nor how a
mode chooses. Needs the extra `eval`; `polymerge.evaluate.run` says so where it is missing.

All requests of one question (its choices, and the same choices without the question) meet the same expert: the first
context of the question that is not empty is what the mode sees, and never a continuation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from ..engine.base import Engine, GenerateRequest, ScoreRequest
from ..errors import ModelError
from .modes import Choose, Question, average, chooser
from .questions import check_choices

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

MAX_NEW_TOKENS = 256  # the harness's own default
# Settings of a generation that the contract has a word for, under the harness's names.
GENERATION_KEYS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})
# Stands for the tokenizer's first special token, which the engine puts before an empty context.
FIRST_TOKEN = -1


@dataclass(frozen=True)
class _Conversation:
    """Turns that the harness had rendered."""

    turns: list[dict[str, str]]
    opens: bool  # the model's turn comes next; otherwise it goes on with the last one

    @property
    def asked(self) -> str:
        """The user's last turn."""
        return next((turn["content"] for turn in reversed(self.turns) if turn["role"] == "user"), "")

    def rendered(self, tokenizer: Any) -> str:
        """As text, by the tokenizer's template."""
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": self.opens}
        if not self.opens:
            options["continue_final_message"] = True
        text: str = tokenizer.apply_chat_template(self.turns, **options)
        return text


@register_model("polymerge")
class PolymergeLM(LM):  # type: ignore[misc]  # the harness has no types
    """The harness's view of an engine.

    Args:
        engine: what runs.
        choose: a mode (`polymerge.evaluate.modes`).
        tokenizer: with a chat template, for `apply_chat_template`; the contract has token ids only.
        tokenizer_of: an expert's own. The harness renders a conversation before its expert is chosen; it is rendered
            again with the expert's template.
        judged: whether the answers will be; else what cannot be judged is asked too.

    Attributes:
        chosen: task -> expert -> how many questions it answered.
    """

    def __init__(
        self,
        engine: Engine,
        choose: Choose | None = None,
        *,
        tokenizer: Any = None,
        tokenizer_of: Callable[[RowExpert], Any] | None = None,
        judged: bool = True,
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer = engine, tokenizer
        self._tokenizer_of = tokenizer_of or (lambda expert: tokenizer)
        self._choose, self._judged = choose or average(), judged
        self._conversations: dict[str, _Conversation] = {}
        self._experts: dict[tuple[str, Any], RowExpert] = {}
        self._prefixes: dict[str, list[int]] = {}
        self.chosen: dict[str, Counter[str]] = defaultdict(Counter)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> PolymergeLM:
        """`simple_evaluate(model="polymerge", model_args={"bundle": ..., "mode": ...})`.

        Raises:
            ModelError: an argument that is not one of bundle, mode, device, dtype, or a mode that needs a router.
        """
        from ..engine.local.engine import HFEngine

        arguments = {**arg_dict, **{k: v for k, v in (additional_config or {}).items() if v is not None}}
        for key in ("batch_size", "max_batch_size"):  # the engine's batches are counted in tokens
            arguments.pop(key, None)
        bundle, mode = arguments.pop("bundle", None), arguments.pop("mode", "average")
        if bundle is None or arguments.keys() - {"device", "dtype"}:
            raise ModelError("the model `polymerge` takes bundle=FOLDER, and mode, device and dtype")
        engine = HFEngine.from_bundle(bundle, **arguments)
        choose = chooser(mode, engine.experts)
        return cls(engine, choose, tokenizer=engine.tokenizer, tokenizer_of=engine.tokenizer_of)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> PolymergeLM:
        """`model_args="bundle=FOLDER,mode=expert:math"`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's cache of requests."""
        return self.engine.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, which the harness hashes into its results."""
        if not chat_template:
            return None
        template = getattr(self.tokenizer, "chat_template", None)
        if template is None:
            raise ModelError("the tokenizer has no chat template; run without --apply-chat-template")
        return template if isinstance(template, str) else str(template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. It is remembered: its last turn of the user for the mode, all of it for the
        template of the expert that will be chosen."""
        conversation = _Conversation([dict(message) for message in chat_history], add_generation_prompt)
        text = conversation.rendered(self.tokenizer)
        self._conversations[text] = conversation
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, is it the greedy answer?) for every request. Raises DataError as
        `check_choices` does."""
        if self._judged:
            check_choices(requests)
        experts = self._experts_of(requests)
        asked = []
        for request, expert in zip(requests, experts, strict=True):
            context, continuation = self.encode_pair(request.args[0], request.args[1], expert)
            asked.append(ScoreRequest(context, continuation, expert))
        scores = self.engine.loglikelihood(asked)
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in nats: every token once, with as much before it as the context holds. There is no
        context, so the mode sees the text itself."""
        experts = self._experts_of(requests)
        windows: list[ScoreRequest] = []
        owners: list[int] = []
        for number, (request, expert) in enumerate(zip(requests, experts, strict=True)):
            tokens = self.engine.encode(request.args[0], special=False, expert=expert)
            # one place less than the context holds: the engine counts the first token of a window in
            for pair in get_rolling_token_windows(tokens, FIRST_TOKEN, self.engine.max_length_of(expert) - 1, 1):
                before, wanted = make_disjoint_window(pair)
                windows.append(ScoreRequest([] if before == [FIRST_TOKEN] else before, wanted, expert))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.engine.loglikelihood(windows), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to their stop texts. Contexts that leave no room for an answer lose their beginning.

        Raises:
            ModelError: a setting of the task's `generation_kwargs` that an engine does not know.
        """
        experts = self._experts_of(requests)
        asked = [self._generation(r.args[0], r.args[1], expert) for r, expert in zip(requests, experts, strict=True)]
        answers = [generation.text for generation in self.engine.generate(asked)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def encode_pair(self, context: str, continuation: str, expert: RowExpert = None) -> tuple[list[int], list[int]]:
        """Token ids as the harness's own models cut them: white space at the context's end belongs to the
        continuation, and both are encoded as one text."""
        if not context:
            return [], self.engine.encode(continuation, special=False, expert=expert)
        context = self._of(context, expert)
        bare = context.rstrip()
        if not bare:
            return [], self.engine.encode(context + continuation, special=False, expert=expert)
        before = self._encode(bare, expert)
        return before, self._encode(context + continuation, expert)[len(before) :]

    def _of(self, text: str, expert: RowExpert) -> str:
        """A context in the words of the expert's chat template, where it is a conversation."""
        conversation, tokenizer = self._conversations.get(text), self._tokenizer_of(expert)
        if conversation is None or tokenizer is self.tokenizer:
            return text
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError(f"expert {expert!r} has no chat template; run without --apply-chat-template")
        return conversation.rendered(tokenizer)

    def _prefix(self, expert: RowExpert) -> list[int]:
        """What the tokenizer puts before a text."""
        key = str(expert)
        if key not in self._prefixes:
            bare, full = (self.engine.encode("a", special=special, expert=expert) for special in (False, True))
            self._prefixes[key] = full[: full.index(bare[0])] if bare and bare[0] in full else []
        return self._prefixes[key]

    def _encode(self, text: str, expert: RowExpert) -> list[int]:
        """With the tokenizer's first token once: a rendered chat template holds it already."""
        prefix = self._prefix(expert)
        start = len(prefix)
        ids = self.engine.encode(text, special=False, expert=expert) if start else []
        if not start or ids[:start] != prefix:
            return self.engine.encode(text, expert=expert)
        if ids[start : 2 * start] == prefix:
            raise ModelError("a context begins with the tokenizer's first token twice; the chat template adds it again")
        return ids

    def _generation(self, context: str, settings: dict[str, Any], expert: RowExpert) -> GenerateRequest:
        try:
            options = dict(normalize_gen_kwargs(settings, MAX_NEW_TOKENS))
        except (ValueError, TypeError) as error:
            raise ModelError(f"generation_kwargs: {error}") from None
        unknown = sorted(options.keys() - GENERATION_KEYS)
        if unknown:
            raise ModelError(f"generation_kwargs: {unknown[0]} is not one of {', '.join(sorted(GENERATION_KEYS))}")
        if options["max_gen_toks"] < 1 or not all(isinstance(text, str) for text in options["until"]):
            raise ModelError("generation_kwargs: max_gen_toks is 1 or more, and until holds texts")
        length = self.engine.max_length_of(expert)
        room = length - options["max_gen_toks"]
        if room < 1:
            raise ModelError(f"max_gen_toks {options['max_gen_toks']} fills the context of {length}")
        context = self._of(context, expert)
        return GenerateRequest(
            (self._encode(context, expert) or self.engine.encode("\n", expert=expert))[-room:],
            expert,
            max_new_tokens=options["max_gen_toks"],
            temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            stop=tuple(text for text in options["until"] if text),
        )

    def _experts_of(self, requests: Sequence[Instance]) -> list[RowExpert]:
        """The expert of every request; a question that was met before keeps its own."""
        keys = [(str(r.task_name), r.args[0] if r.doc_id is None else r.doc_id) for r in requests]
        fresh: dict[tuple[str, Any], Question] = {}
        for key, request in zip(keys, requests, strict=True):
            text = request.args[0].strip()
            known = key in self._experts or (key in fresh and fresh[key].text)
            if not known and (text or key not in fresh):
                row = request.doc if isinstance(request.doc, dict) else {}
                conversation = self._conversations.get(request.args[0])
                fresh[key] = Question((conversation.asked if conversation else "") or text, key[0], row)
        for key, expert in zip(fresh, self._choose(list(fresh.values())) if fresh else (), strict=True):
            self._experts[key] = expert
            self.chosen[key[0]][expert if isinstance(expert, str) else "mixture" if expert else "average"] += 1
        return [self._experts[key] for key in keys]
