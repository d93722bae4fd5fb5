"""How a token is chosen, against transformers' own processors of logits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import MinPLogitsWarper

from polymerge.engine import GenerateRequest
from polymerge.engine.sampling import NUCLEUS, Sampler, choose_tokens
from polymerge.errors import ModelError

GREEDY = GenerateRequest("")
DRAWN = GenerateRequest("", temperature=1.0)


def drawn(logits: torch.Tensor, request: GenerateRequest, times: int) -> list[int]:
    """Tokens of so many rows with these logits [V], seeded 0, 1, 2 ..."""
    samplers = [Sampler(replace(request, seed=seed), ()) for seed in range(times)]
    return choose_tokens(logits.repeat(times, 1), samplers)


def test_top_p_keeps_the_token_that_crosses_the_share() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    tokens = drawn(logits, replace(DRAWN, top_p=0.6), 400)
    assert set(tokens) == {0, 1} and 200 < tokens.count(0) < 300
    assert set(drawn(logits, DRAWN, 400)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "request_",
    [
        replace(DRAWN, top_k=5),
        replace(DRAWN, top_p=0.7),
        replace(DRAWN, min_p=0.2),
        replace(DRAWN, top_k=8, top_p=0.7),
        replace(DRAWN, temperature=2.0, top_k=1),
        replace(DRAWN, temperature=0.5, top_p=0.9, min_p=0.05),
        replace(DRAWN, temperature=9.0, top_p=0.99),  # more than the nucleus that is looked at first
        replace(DRAWN, temperature=9.0, min_p=0.01),
    ],
)
@pytest.mark.parametrize("vocabulary", [40, 3 * NUCLEUS])
def test_what_may_be_drawn_is_what_transformers_leaves(request_: GenerateRequest, vocabulary: int) -> None:
    """`min_p` first, as in vLLM, then `top_k` and `top_p`; every one of transformers' own."""
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    left = logits / request_.temperature
    if request_.min_p:
        left = MinPLogitsWarper(request_.min_p)(None, left)
    if request_.top_k:
        left = TopKLogitsWarper(request_.top_k)(None, left)
    if request_.top_p < 1:
        left = TopPLogitsWarper(request_.top_p)(None, left)
    expected = left.softmax(-1)[0]
    times = 4000
    tokens = torch.tensor(drawn(logits[0], request_, times))
    counts = torch.bincount(tokens, minlength=vocabulary)
    assert not counts[expected == 0].any()
    error = (expected * (1 - expected) / times).sqrt()
    assert ((counts / times - expected).abs() <= 6 * error + 3 / times).all()


def test_the_penalty_is_transformers_own_and_each_rows() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    prompts = [[1, 2, 3, 3], [4], [5, 6]]
    penalties = [1.8, 1.0, 0.5]
    expected = [
        int(RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), row[None].clone()).argmax())
        for ids, penalty, row in zip(prompts, penalties, logits, strict=True)
    ]
    before = logits.clone()
    samplers = [
        Sampler(replace(GREEDY, repetition_penalty=penalty), ids)
        for ids, penalty in zip(prompts, penalties, strict=True)
    ]
    assert choose_tokens(logits, samplers) == expected
    assert torch.equal(logits, before)  # scores are told of the model's own logits
    likeliest = int(logits[0].argmax())
    strong = Sampler(replace(GREEDY, repetition_penalty=100.0), [likeliest])
    assert choose_tokens(logits[:1], [strong]) != [likeliest]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1),
     ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf"))],
)  # fmt: skip
def test_a_number_that_means_nothing_is_refused(setting: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"generate: {setting} cannot be {value}"):
        replace(DRAWN, **{setting: value})


def test_penalties_of_the_answer_and_biases_are_openais() -> None:
    """logit - (it is there) presence - (how often) frequency + bias, each row's own."""
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    requests = [
        replace(GREEDY, presence_penalty=1.5, frequency_penalty=0.25, logit_bias={3: 2.0}),
        replace(GREEDY, frequency_penalty=-0.5),
        GREEDY,
    ]
    answers = [[3, 3, 7], [1, 1, 1, 2], [5]]
    samplers = [Sampler(request, [9, 9]) for request in requests]
    expected = logits.clone()
    for row, (sampler, made) in enumerate(zip(samplers, answers, strict=True)):
        for token in made:
            sampler.take(token)
        asked = sampler.request
        for token in range(20):
            count = made.count(token)
            expected[row, token] -= asked.presence_penalty * (count > 0) + asked.frequency_penalty * count
            expected[row, token] += asked.logit_bias.get(token, 0.0)
    assert choose_tokens(logits, samplers) == expected.argmax(-1).tolist()
    assert torch.equal(expected[2], logits[2])


def test_a_bias_forbids_and_forces() -> None:
    logits = torch.zeros(1, 6)
    forced = replace(DRAWN, logit_bias={4: 100.0})
    assert set(drawn(logits[0], forced, 50)) == {4}
    forbidden = replace(DRAWN, logit_bias=dict.fromkeys((0, 1, 2, 3), -100.0))
    assert set(drawn(logits[0], forbidden, 200)) == {4, 5}


@pytest.mark.parametrize("wrong", [{"presence_penalty": 2.1}, {"frequency_penalty": -3.0}, {"logit_bias": {1: 101.0}}])
def test_bounds_are_openais(wrong: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(wrong))} cannot be"):
        replace(GREEDY, **wrong)


def test_rows_of_one_batch_draw_as_they_would_alone() -> None:
    """Whatever the others' settings are, and however many of the likeliest tokens these make it look at."""
    logits = 2 * torch.randn(6, 3 * NUCLEUS, generator=torch.Generator().manual_seed(3))
    requests = [
        GREEDY,
        DRAWN,
        replace(DRAWN, top_k=3),
        replace(DRAWN, top_p=0.4),
        replace(DRAWN, temperature=9.0, top_p=0.99),
        replace(DRAWN, min_p=0.3),
    ]
    for seed in range(40):
        asked = [replace(request, seed=seed) for request in requests]
        together = choose_tokens(logits, [Sampler(request, ()) for request in asked])
        alone = [choose_tokens(logits[row : row + 1], [Sampler(r, ())])[0] for row, r in enumerate(asked)]
        assert together == alone
