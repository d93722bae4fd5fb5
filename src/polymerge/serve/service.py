"""What the endpoints share: from a checked request to submitted answers, and from these to a response."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..engine.base import GenerateRequest
from ..engine.streaming import Finish, Piece, StreamingEngine, StreamRequest
from ..engine.structure import Structure
from ..errors import ModelError
from ..router.route import Routes
from ..staged import Question
from .answering import Calling
from .answers import Gathered, Run, while_wanted
from .errors import ApiError, Fields, told
from .gate import Gate
from .metrics import Metrics
from .routing import Choice, Chooser
from .schema import ChatRequest, Generating
from .settings import ServeSettings
from .shapes import ChatShape, Shape, event, usage
from .stages import Responds, Stages, question_of

if TYPE_CHECKING:
    from ..model.assignment import RowExpert

logger = logging.getLogger("polymerge.serve")
Item = TypeVar("Item")
Result = TypeVar("Result")
# Texts that become tokens in one go; a client that goes is noticed between.
TOKENIZED_AT_ONCE = 32
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Service:
    """The parts of a running server.

    Attributes:
        gate: what every request that touches the model passes first.
        ready: whether new requests are welcome; turned off while the server ends.
    """

    def __init__(
        self, engine: StreamingEngine, router: Routes | None, pipeline: Responds | None, settings: ServeSettings
    ) -> None:
        self.engine, self.settings = engine, settings
        self.stages = Stages(pipeline, settings) if pipeline else None
        self.gate = Gate(settings.max_rows + settings.max_waiting)
        self.metrics = Metrics(lambda: engine.state, lambda: self.gate.held)
        self.chooser = Chooser(engine, router, settings, staged=pipeline is not None)
        self.ready = True

    async def admitted(self, request: Request, places: int, work: Callable[[], Awaitable[Response]]) -> Response:
        """The response of all work that touches the model. Its places are taken before anything is done, and given
        back when the response has ended; the work ends with its client, and with its time, counted from when the
        request came.

        Raises:
            ApiError: more places than there are. EngineBusyError: too many requests are under way. DeadlineError.
        """
        if places > self.gate.most:
            raise ApiError(400, f"n: this server makes at most {self.gate.most} answers at a time", param="n")
        request.state.ends.callback(self.gate.take(places))
        return await while_wanted(request, work(), due=self.due(request), seconds=self.settings.seconds)

    def due(self, request: Request) -> float:
        """Until when a request must be answered, as a time of `time.monotonic()`."""
        return float(request.state.began) + self.settings.seconds

    async def choose(self, request: Request, model: str, turns: Sequence[str], *, sticky: bool = True) -> Choice:
        """The expert, counted and noted for the log."""
        began = time.monotonic()
        choice = await self.chooser.choose(model, turns, sticky=sticky)
        if choice.route is not None:
            self.metrics.route_seconds.observe(time.monotonic() - began)
        self.metrics.routed(choice)
        request.state.expert = choice.name
        return choice

    async def tokens(self, make: Callable[[], list[int]], param: str) -> list[int]:
        """Token ids of a request's text, off the event loop."""
        try:
            ids = await in_thread(make)
        except (ApiError, ModelError):
            raise
        except Exception as error:  # chat templates raise what they like for turns that they do not know
            logger.info("a prompt could not be made", exc_info=error)
            raise ApiError(400, f"{param}: the model's chat template cannot write these turns", param=param) from None
        if not ids:
            raise ApiError(400, f"{param}: is empty", param=param)
        return ids

    async def each(self, given: Sequence[Item], make: Callable[[Item], Result]) -> list[Result]:
        """`make` of every item, off the event loop; between a few of them the request can be cancelled."""
        made: list[Result] = []
        for start in range(0, len(given), TOKENIZED_AT_ONCE):
            some = given[start : start + TOKENIZED_AT_ONCE]
            made += await in_thread(partial(_all, make, some))
        return made

    def check_limits(self, body: Generating, tokens: int | None, prompts: int = 1, *, fields: Fields) -> int:
        """What can be refused before any work. Returns the answers that are asked for.

        Raises:
            ApiError: no such model, more tokens or answers than this server gives.
        """
        self.chooser.check(body.model)
        answers = (body.n or 1) * prompts
        if answers > self.settings.max_choices:
            asked = "n" if prompts == 1 else "prompt"
            raise ApiError(400, f"{asked}: at most {self.settings.max_choices} answers a request", param=asked)
        if tokens is not None and tokens > self.settings.max_tokens:
            most = self.settings.max_tokens
            raise ApiError(400, f"{fields.tokens}: this server gives at most {most}", param=fields.tokens)
        return answers

    def stream_requests(
        self,
        request: Request,
        body: Generating,
        prompts: Sequence[list[int]],
        choices: Sequence[Choice],
        *,
        tokens: int | None,
        logprobs: int | None,
        score_prompt: bool = False,
        calling: Calling | None = None,
        structure: Structure | None = None,
        fields: Fields,
    ) -> list[StreamRequest]:
        """`n` requests a prompt. The k-th answer of a seeded request has the seed plus k.

        Raises:
            ApiError: more tokens than the model's context has room for.
        """
        count = body.n or 1
        requests = []
        for prompt, choice in zip(prompts, choices, strict=True):
            defaults = self.engine.defaults_of(choice.expert)
            asked = GenerateRequest(
                prompt,
                choice.expert,
                max_new_tokens=self._budget(len(prompt), tokens, choice.expert, fields),
                temperature=defaults.temperature if body.temperature is None else body.temperature,
                top_p=defaults.top_p if body.top_p is None else body.top_p,
                seed=body.seed,
                stop=body.stops,
                top_k=defaults.top_k if body.top_k is None else max(0, body.top_k),
                min_p=defaults.min_p if body.min_p is None else body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logit_bias=body.biases,
                ignore_eos=bool(body.ignore_eos),
                structure=calling.structure if calling else structure or body.structure,
                skip_special_tokens=calling is None,
            )
            seeds = [None if body.seed is None else body.seed + k for k in range(count)]
            requests += [
                StreamRequest(
                    replace(asked, seed=seed), logprobs, score_prompt, self.settings.seconds, request.state.began
                )
                for seed in seeds
            ]
        return requests

    def run(self, request: Request, requests: Sequence[StreamRequest]) -> Run:
        """The requests under way; they end with the response."""
        run = Run(self.engine, requests, self.metrics, began=request.state.began)
        request.state.ends.callback(self._end, run, requests)
        return run

    async def respond(
        self,
        request: Request,
        body: Generating,
        shape: Shape,
        requests: Sequence[StreamRequest],
        choices: Sequence[Choice],
    ) -> Response:
        """Submits and answers, whole or as a stream. `choices` has one entry a prompt."""
        run = self.run(request, requests)
        count = len(requests) // len(choices)
        read = sum(run.prompt_tokens[::count])
        self.metrics.tokens.labels("prompt").inc(read)
        extra: dict[str, Any] = {"polymerge": choices[0].body}
        if body.stream:
            source = _events(run, shape, extra, read, body.usage_at_the_end)
            return StreamingResponse(source, media_type="text/event-stream", headers=SSE_HEADERS | choices[0].headers)
        answers = await run.whole()
        listed = [shape.choice(number, answer) for number, answer in enumerate(answers)]
        if len(choices) > 1:
            listed = [one | {"polymerge": choices[n // count].body} for n, one in enumerate(listed)]
        spent = usage(read, sum(answer.tokens for answer in answers))
        return JSONResponse(shape.head() | {"choices": listed, "usage": spent} | extra, headers=choices[0].headers)

    async def respond_in_stages(self, request: Request, body: ChatRequest) -> Response:
        """The answer of the model `staged`; as a stream, it comes in one piece."""
        stages = self.stages
        if stages is None:
            raise ApiError(404, "this server has no thinker", param="model", code="model_not_found")
        question = await self._staged_question(body)
        response = await stages.ask(question, due=self.due(request))
        thoughts = response.thought if body.polymerge.thoughts else None
        choice = Choice(
            response.expert, response.route, stage=response.stage, reason=response.reason, thoughts=thoughts
        )
        self.metrics.routed(choice)
        self.metrics.tokens.labels("prompt").inc(response.prompt_tokens)
        self.metrics.tokens.labels("completion").inc(response.tokens)
        request.state.expert = choice.name
        if self.settings.log_prompts:
            logger.info("prompt %r answer %r", question.text, response.text)
        written = response.tokens - response.thinker_tokens
        finish: Finish = "length" if written >= question.max_new_tokens else "stop"
        piece = Piece(response.text, response.tokens, finish)
        shape = ChatShape(body.model, self.engine.fingerprint, scored=False, stream=bool(body.stream))
        spent = usage(response.prompt_tokens, response.tokens)
        head = shape.head() | {"polymerge": choice.body}
        if not body.stream:
            answer = Gathered(piece.text, piece.tokens, finish)
            whole = head | {"choices": [shape.choice(0, answer)], "usage": spent}
            return JSONResponse(whole, headers=choice.headers)
        blank = {"usage": None} if body.usage_at_the_end else {}
        chunks = [head | {"choices": [one]} | blank for one in (*shape.opening(0), shape.delta(0, piece))]
        if body.usage_at_the_end:
            chunks.append(shape.head() | {"choices": [], "usage": spent})
        content = b"".join(map(event, chunks)) + event("[DONE]")
        return Response(content, media_type="text/event-stream", headers=SSE_HEADERS | choice.headers)

    async def _staged_question(self, body: ChatRequest) -> Question:
        """With the budget of an ordinary request's answer; where that names none, half of the context's room is left
        to the thought and to what the stages write around it. Raises ApiError as `_budget` does."""
        question = question_of(body)
        turn = [{"role": "user", "content": question.text}]
        prompt = len(await self.tokens(lambda: self.engine.chat_prompt(turn), "messages"))
        tokens = self._budget(prompt, body.wanted_tokens, None, body.fields)
        if body.wanted_tokens is None:
            tokens = max(1, min(tokens, (self.engine.max_length_of(None) - prompt) // 2))
        return replace(question, max_new_tokens=tokens)

    def _budget(self, prompt: int, tokens: int | None, expert: RowExpert, fields: Fields) -> int:
        """Tokens that an answer may have. Raises ApiError: the context has no room for them."""
        length = self.engine.max_length_of(expert)
        room = length - prompt
        if room < (0 if tokens == 0 else 1):
            message = (
                f"{fields.prompt}: has {prompt} tokens, which leave no room for an answer; the context is {length}"
            )
            raise ApiError(400, message, param=fields.prompt, code="context_length_exceeded")
        if tokens is None:
            usual = self.engine.defaults_of(expert).max_new_tokens or room
            tokens = max(1, min(room, usual, self.settings.max_tokens))
        if tokens > room:
            message = f"the prompt has {prompt} tokens and the answer up to {tokens}; the context is {length}"
            raise ApiError(400, message, param=fields.tokens, code="context_length_exceeded")
        return tokens

    def _end(self, run: Run, requests: Sequence[StreamRequest]) -> None:
        """Whole answers, streams and those whose client has gone: all are stopped, and logged where that is wanted."""
        run.close()
        if self.settings.log_prompts:
            for request, answer in zip(requests, run.answers, strict=True):
                asked = request.generate
                text = self.engine.decode(asked.prompt, expert=asked.expert)  # type: ignore[arg-type]  # ids by now
                logger.info("prompt %r answer %r", text, answer.text)


def _all(make: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [make(item) for item in items]


async def in_thread(call: Callable[[], Result]) -> Result:
    """Runs what blocks for a moment (tokenizers) beside the event loop. What waits for the model has a `Lane`."""
    return await run_sync(call)


async def _events(run: Run, shape: Shape, extra: dict[str, Any], read: int, with_usage: bool) -> AsyncIterator[bytes]:
    """The chunks of a stream; an error in the middle is an event of its own, and no [DONE] follows it."""
    blank = {"usage": None} if with_usage else {}
    head, untold = shape.head(), set(range(len(run.answers)))
    try:
        for number in range(len(run.answers)):
            for opening in shape.opening(number):
                yield event(head | {"choices": [opening]} | blank | extra)
                untold.discard(number)
        async for number, piece in run:
            told_now = extra if piece.finish or number in untold else {}
            if (delta := shape.delta(number, piece)) is not None:
                untold.discard(number)
                yield event(head | {"choices": [delta]} | blank | told_now)
        if with_usage:
            spent = usage(read, sum(answer.tokens for answer in run.answers))
            yield event(head | {"choices": [], "usage": spent})
        yield event("[DONE]")
    except Exception as error:
        known = told(error)
        if known.status == 500:
            logger.exception("an answer failed")
        yield event(known.body)
