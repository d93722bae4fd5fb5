"""The rows that a model reads together: newcomers join after their prompts were read, answers that are over leave.

Knows tokens, caches and experts. Does not know who waits (`polymerge.engine.local.batching` for a server, `offline`
for a list) or what tokens mean as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..admission import Demand, Limits, padded, surplus
from ..answer import Answer
from ..sampling import choose_tokens
from ..streaming import TokenScore
from .cache import RunningCache, rope_is_fixed
from .captured import StepGraphs
from .loaded import LoadedModel
from .prefix import PrefixCache, common
from .reading import Reading, token_scores

# Columns of a prompt that nobody waits behind are read so many at a time: bounds what attention and scores need.
COLUMNS = 512


class RunningBatch:
    """Answers in the making. All calls come from one thread.

    Args:
        prefix_tokens: of beginnings that are remembered, at most.

    Attributes:
        rows: the answers that get a token with every step.
    """

    def __init__(self, engine: LoadedModel, prefix_tokens: int = 0) -> None:
        self._engine, self._graphs = engine, StepGraphs(engine)
        self._cache = RunningCache(self._graphs.clear)
        # what is read apart must have the keys that it has when all is read at once
        self._in_pieces = rope_is_fixed(engine.model.modules())
        self._prefixes = PrefixCache(prefix_tokens if self._in_pieces else 0)
        self.rows: list[Answer] = []
        self._readings: list[Reading] = []
        self._assignment = ExitStack()
        self._assigned = False

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def answers(self) -> list[Answer]:
        """Of the rows, and of the newcomers that are being read. Other threads look at them too: those that are about
        to be rows are seen twice rather than not at all."""
        newcomers = [answer for reading in self._readings for answer in reading.answers]
        return list(dict.fromkeys([*self.rows, *newcomers]))

    @property
    def reads(self) -> bool:
        """Whether newcomers are being read."""
        return bool(self._readings)

    def clear(self) -> list[Answer]:
        """Drops the caches of all answers and what is remembered. Returns the answers; they join again when they are to
        go on."""
        self.pause()
        dropped, self.rows, self._readings = self.answers, [], []
        self._graphs.clear()
        self._cache = RunningCache(self._graphs.clear)
        self._prefixes.fit(0)
        return dropped

    def pause(self) -> None:
        """Takes the rows' experts off the model, so that it can be used for something else."""
        self._assignment.close()
        self._assigned = False

    @torch.inference_mode()
    def leave(self) -> None:
        """Drops the answers that are over."""
        self._leave([answer for answer in self.rows if answer.over])
        self._readings = [reading for reading in self._readings if not reading.over]

    def youngest(self, limits: Limits) -> list[Answer]:
        """Those that must go so that the others have room for what they have become, and who is read with them; the
        oldest first."""
        staying, going = self.answers, list[Answer]()
        while (place := surplus([answer.demand for answer in staying], limits)) is not None:
            one = staying[place]
            going += next((reading.answers for reading in self._readings if one in reading.answers), [one])
            staying = [answer for answer in staying if answer not in going]
        return sorted(going, key=lambda answer: answer.number)

    @torch.inference_mode()
    def relieve(self, going: Sequence[Answer], tokens: int) -> None:
        """Drops answers, which can go on from the tokens that they have, and of the remembered beginnings what has no
        room beside the others.

        Args:
            tokens: for which there is room in all.
        """
        self._leave(going)
        self._readings = [reading for reading in self._readings if reading.answers[0] not in going]
        self._prefixes.fit(tokens - self.tokens)

    @property
    def tokens(self) -> int:
        """In the caches of all, padding included."""
        return padded([answer.demand.unread for answer in self.answers])

    def apart(self, newcomers: Sequence[Answer]) -> tuple[list[list[Answer]], list[Answer]]:
        """Newcomers in groups that are best read together, and those that had better wait, because another one of them
        begins as they do."""
        groups: dict[bool, list[Answer]] = {}
        later: list[Answer] = []
        before: list[Answer] = []
        for answer in newcomers:
            if self._awaits(answer, before):
                later.append(answer)
            else:
                groups.setdefault(bool(self._known(answer)), []).append(answer)
                before.append(answer)
        return list(groups.values()), later

    def awaits(self, answer: Answer) -> bool:
        """Whether it had better wait for one that is being read, because that begins as it does."""
        return self._awaits(answer, [other for reading in self._readings for other in reading.answers])

    def demand(self, answer: Answer) -> Demand:
        """What an answer that waits takes, less what is remembered of it."""
        return replace(answer.demand, known=self._known(answer))

    def _awaits(self, answer: Answer, others: Sequence[Answer]) -> bool:
        if not self._prefixes.holds or not others:
            return False
        known = self._known(answer)
        return any(_common(answer, other) > known for other in others)

    def _known(self, answer: Answer) -> int:
        if answer.request.score_prompt:  # all of its tokens are read, whatever is known
            return 0
        return self._prefixes.known(answer.request.generate.expert, answer.tokens)

    @torch.inference_mode()
    def join(self, newcomers: Sequence[Answer]) -> None:
        """Reads the newcomers' tokens, all in one batch, and takes the first new token of each."""
        self.begin(newcomers)
        reading = self._readings[-1]
        while not self._read(reading, COLUMNS):
            pass

    def begin(self, newcomers: Sequence[Answer]) -> None:
        """Newcomers are read from now on, all in one batch."""
        self._readings = [*self._readings, Reading(self._engine, newcomers, self._prefixes)]

    @torch.inference_mode()
    def read(self, tokens: int) -> int:
        """A piece of the newcomers' tokens, padding included: of those who can be read to their end the shortest, or
        else of those whose turn it is. Those of whom all is read join. Returns how many tokens were read."""
        least = min(self._readings, key=lambda reading: reading.rest)
        reading = least if least.rest <= tokens else self._readings[0]
        self._readings = [*(other for other in self._readings if other is not reading), reading]
        rest = reading.rest
        over = self._read(reading, max(1, tokens // len(reading.answers)))
        return rest if over else rest - reading.rest

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row."""
        mask = self._cache.before_step()
        experts = [answer.request.generate.expert for answer in self.rows]
        latest = [answer.made[-1] for answer in self.rows]
        logits = self._graphs.step(self._cache, experts, latest, lambda: self._step(mask, latest), self.pause)
        self._cache.after_step()
        self._take(self.rows, logits)

    def _step(self, mask: Tensor, latest: Sequence[int]) -> Tensor:
        """Logits after every row's latest token, [B, V]."""
        device = self._engine.device
        self._assign()
        output = self._engine.hf(
            input_ids=torch.tensor(latest, device=device)[:, None],
            attention_mask=mask.to(device),
            position_ids=torch.tensor(self._cache.lengths, device=device)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _leave(self, answers: Sequence[Answer]) -> None:
        for row in reversed(range(len(self.rows))):
            if self.rows[row] in answers:
                self.pause()
                self._cache.leave(row)
                self.rows[row] = self.rows[-1]
                self.rows.pop()
        if answers and not self.rows and not len(self._graphs):  # a captured step's buffers stay for the next answers
            self._cache = RunningCache(self._graphs.clear)

    def _read(self, reading: Reading, columns: int) -> bool:
        """Whether all is read."""
        self.pause()
        logits = reading.read(columns if self._in_pieces else reading.left)
        if logits is None:
            return False
        staying = [row for row, answer in enumerate(reading.answers) if not answer.over]
        joined = [reading.answers[row] for row in staying]
        if joined:
            if len(joined) < len(reading.answers):
                reading.cache.batch_select_indices(torch.tensor(staying, device=logits.device))
            self._cache.join(reading.cache, [len(answer.tokens) for answer in joined])
            self.rows += joined
        self._forget(reading)
        if joined:
            self._take(joined, logits[staying])
        return True

    def _forget(self, reading: Reading) -> None:
        self._readings = [other for other in self._readings if other is not reading]

    def _assign(self) -> None:
        """The rows' experts stay on the model until rows change or somebody else uses it."""
        if not self._assigned:
            experts = [answer.request.generate.expert for answer in self.rows]
            self._assignment.enter_context(self._engine.assigned(experts, len(experts)))
            self._assigned = True

    def _take(self, answers: Sequence[Answer], logits: Tensor) -> None:
        requests = [answer.request for answer in answers]
        tokens = choose_tokens(logits, [answer.sampler for answer in answers])
        for row, (answer, request, token) in enumerate(zip(list(answers), requests, tokens, strict=True)):
            wanted = request.logprobs is not None
            answer.take(token, self._score(answer, logits[row : row + 1], token) if wanted else None)

    @staticmethod
    def _score(answer: Answer, logits: Tensor, token: int) -> TokenScore:
        return token_scores(answer.text_of, logits, [token], answer.request.logprobs or 0)[0]


def _common(answer: Answer, other: Answer) -> int:
    if answer.request.score_prompt:
        return 0
    return common(answer.request.generate.expert, answer.tokens, other.request.generate.expert, other.tokens)
