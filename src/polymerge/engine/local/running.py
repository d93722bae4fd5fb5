"""The rows that a model reads together: newcomers join after their prompts were read, answers that are over leave.

Knows tokens, caches and experts. Does not know who waits (`polymerge.engine.local.batching` for a server, `offline`
for a list) or what tokens mean as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..admission import Limits, surplus
from ..answer import Answer
from ..sampling import choose_tokens
from ..streaming import TokenScore
from .cache import RunningCache
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
        self._engine, self._cache = engine, RunningCache()
        self._prefixes, self._graphs = PrefixCache(prefix_tokens), StepGraphs(engine)
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
        """Drops the caches of all answers. Returns them; they join again when they are to go on."""
        self.pause()
        dropped, self.rows, self._cache = self.answers, [], RunningCache()
        self._readings = []
        self._graphs.clear()
        return dropped

    def pause(self) -> None:
        """Takes the rows' experts off the model, so that it can be used for something else."""
        self._assignment.close()
        self._assigned = False

    @torch.inference_mode()
    def leave(self) -> None:
        """Drops the answers that are over."""
        for row in reversed(range(len(self.rows))):
            if self.rows[row].over:
                self._leave(row)
        self._readings = [reading for reading in self._readings if not reading.over]

    @torch.inference_mode()
    def relieve(self, limits: Limits) -> list[Answer]:
        """Drops the youngest until the others have room for what they have become, and the remembered beginnings that
        are in their way. Returns those that were dropped, the oldest first; they can go on from the tokens that they
        have."""
        dropped: list[Answer] = []
        while (youngest := surplus([answer.demand for answer in self.answers], limits)) is not None:
            answer = self.answers[youngest]
            reading = next((reading for reading in self._readings if answer in reading.answers), None)
            if reading is None:
                self._leave(self.rows.index(answer))
                dropped.append(answer)
            else:
                self._forget(reading)
                dropped += reading.answers
        self._prefixes.fit(limits.cache_tokens - self.tokens)
        return sorted((answer for answer in dropped if not answer.over), key=lambda answer: answer.number)

    @property
    def tokens(self) -> int:
        """In the caches of all, padding included."""
        widest = max((len(answer.tokens) for answer in self.answers), default=0)
        return len(self) * widest

    def apart(self, newcomers: Sequence[Answer]) -> tuple[list[list[Answer]], list[Answer]]:
        """Newcomers in groups that are best read together, and those that had better wait, because another one that is
        read before them begins as they do."""
        groups: dict[bool, list[Answer]] = {}
        later: list[Answer] = []
        before = [answer for reading in self._readings for answer in reading.answers]
        for answer in newcomers:
            known = self._known(answer)
            if self._prefixes.most and any(_common(answer, other) > known for other in before):
                later.append(answer)
            else:
                groups.setdefault(bool(known), []).append(answer)
                before.append(answer)
        return list(groups.values()), later

    def _known(self, answer: Answer) -> int:
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
    def read(self, tokens: int) -> None:
        """A piece of the newcomers' tokens, padding included; they take turns. Those of whom all is read join."""
        reading, *others = self._readings
        self._readings = [*others, reading]
        self._read(reading, max(1, tokens // len(reading.answers)))

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

    def _leave(self, row: int) -> None:
        self.pause()
        self._cache.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def _read(self, reading: Reading, columns: int) -> bool:
        """Whether all is read."""
        self.pause()
        logits = reading.read(columns)
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
    if answer.request.score_prompt:  # all of its tokens are read, whatever is known
        return 0
    return common(answer.request.generate.expert, answer.tokens, other.request.generate.expert, other.tokens)
