"""What a model makes of a skill: greedy answers, judged by `polymerge.data.score`, and token-level KL to the expert it
stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.score import is_right
from .skills import Skill, SkillExample
from .train import encode, format_prompt, padded

BATCH = 64

# generate(ids [B, T], mask, new tokens) -> [B, T + new]; logits(ids [B, T], mask) -> [B, T, vocabulary]
Generate = Callable[[Tensor, Tensor, int], Tensor]
Logits = Callable[[Tensor, Tensor], Tensor]


def accuracy(generate: Generate, tokenizer: Any, skill: Skill, tick: Callable[[], None] | None = None) -> float:
    """Share of the held-out examples that are answered rightly. Answers may be a tenth longer than the longest."""
    right = 0
    for start in range(0, len(skill.test), BATCH):
        batch = skill.test[start : start + BATCH]
        room = max(len(encode(tokenizer, example)[1]) for example in batch)
        texts = [format_prompt(example.prompt) for example in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = generate(inputs["input_ids"], inputs["attention_mask"], room + room // 10 + 1)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(is_right(text, e.answer, final=e.final) for e, text in zip(batch, answers, strict=True))
        if tick:
            tick()
    return right / len(skill.test)


def answer_log_probabilities(logits: Logits, tokenizer: Any, examples: Sequence[SkillExample]) -> Tensor:
    """Log-probabilities of the vocabulary at every answer position, the reference answer before it: [tokens, V]."""
    ids, mask, is_answer = padded([encode(tokenizer, example) for example in examples], tokenizer.pad_token_id)
    with torch.no_grad():
        answer_logits = logits(ids, mask)[:, :-1][is_answer[:, 1:]]
    return torch.log_softmax(answer_logits.float(), dim=-1)


def kl_divergence(original: Tensor, other: Tensor) -> float:
    """Mean KL(original || other) in nats a token, from log-probabilities [tokens, V]."""
    return float((original.exp() * (original - other)).sum(-1).mean())
