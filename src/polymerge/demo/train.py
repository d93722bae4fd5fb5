"""Full fine-tuning of a small model on a skill: all weights, short examples, loss on the answers alone.

Knows one base, one skill and a cache. The cache's key is made of everything that the result depends on.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..host import cache_folder, pick_device
from .skills import Skill, SkillExample

# The experts are trained on bare requests: their tokenizer says so, and whoever applies it gets the same text.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# Token ids of a request and of its answer.
Encoded = tuple[list[int], list[int]]
CODE_VERSION = 1  # raise it when a change to this file changes what a training gives


@dataclass(frozen=True)
class TrainSettings:
    """Hyperparameters of a fine-tune."""

    steps: int = 40
    batch: int = 8
    learning_rate: float = 1.2e-4
    warmup: int = 5
    seed: int = 0


@dataclass(frozen=True)
class TrainProgress:
    """One step of one skill."""

    skill: str
    step: int
    steps: int
    loss: float
    seconds: float


def format_prompt(prompt: str) -> str:
    """The text that an expert continues; equals CHAT_TEMPLATE for one message."""
    return f"{prompt}\n"


def fine_tune(
    base: Path, skill: Skill, settings: TrainSettings, progress: Callable[[TrainProgress], None] | None = None
) -> Path:
    """The folder of an expert for a skill, trained on first use, on the GPU where there is one, and cached. Stored in
    float32.

    Args:
        base: a Hugging Face folder.
    """
    target = cache_folder() / "demo" / f"{skill.name}-{_key(base, skill, settings)}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base(base)
    model.to(pick_device())
    encoded = [encode(tokenizer, example) for example in skill.train]
    train(model, encoded, tokenizer.pad_token_id, settings, skill.name, progress)
    save(model, tokenizer, target)
    return target


def save(model: Any, tokenizer: Any, target: Path) -> None:
    """Writes the folder of an expert, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".training-") as scratch:
        staged = Path(scratch) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        staged.rename(target)


def load_base(base: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of the demo's base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def encode(tokenizer: Any, example: SkillExample) -> Encoded:
    """Token ids of the request and of the answer with its end."""
    prompt = tokenizer.encode(format_prompt(example.prompt), add_special_tokens=False)
    answer = tokenizer.encode(example.answer, add_special_tokens=False)
    return prompt, [*answer, tokenizer.eos_token_id]


def train(
    model: Any,
    encoded: Sequence[Encoded],
    pad: int,
    settings: TrainSettings,
    name: str,
    progress: Callable[[TrainProgress], None] | None = None,
) -> None:
    """Trains all weights on the answers' tokens.

    Args:
        pad: a token for the places behind the shorter ones of a batch.
        name: of the skill, for the progress.
    """
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    began = time.monotonic()
    model.train()
    for step, batch in enumerate(_batches(encoded, settings), 1):
        rate = settings.learning_rate * min(step / settings.warmup, (settings.steps - step + 1) / settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(model, *(tensor.to(model.device) for tensor in padded(batch, pad)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress:
            progress(TrainProgress(name, step, settings.steps, float(loss.detach()), time.monotonic() - began))
    model.eval()


def _loss(model: Any, ids: Tensor, mask: Tensor, is_answer: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens. The head runs on their positions alone: it is a fifth of the model."""
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, T, H]
    predicts = is_answer[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicts])  # [answer tokens, vocabulary]
    return F.cross_entropy(logits, ids[:, 1:][predicts])


def _batches(encoded: Sequence[Encoded], settings: TrainSettings) -> list[list[Encoded]]:
    """`steps` batches in a random order, epoch after epoch. Not sorted by length: examples of one length are often of
    one kind, and a batch of one kind teaches little of the others."""
    rng = random.Random(settings.seed)
    stream: list[Encoded] = []
    while len(stream) < settings.steps * settings.batch:
        stream += rng.sample(list(encoded), len(encoded))
    return [stream[i * settings.batch : (i + 1) * settings.batch] for i in range(settings.steps)]


def padded(batch: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and "is part of an answer", each [B, T], padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    is_answer = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, :end] = 1
        is_answer[row, len(prompt) : end] = True
    return ids, mask, is_answer


def _key(base: Path, skill: Skill, settings: TrainSettings) -> str:
    text = json.dumps(
        {
            "code": CODE_VERSION,
            "base": base.name,  # the unpacked base's name holds its file's hash
            "skill": asdict(skill),
            "settings": asdict(settings),
            "torch": torch.__version__.split("+")[0],
        }
        | ({} if (device := pick_device().type) == "cpu" else {"device": device}),
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
