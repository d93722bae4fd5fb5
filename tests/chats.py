"""Two real chat fine-tunes of SmolLM2-135M-Instruct, by the demo's own training: on first use, and kept in the cache.

`chatml` has ChatML with two tokens of its own, between which it answers: its table is two rows longer, and the second
of them ends it. `plain` has another template, in words, and the end token of the base's plain texts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from polymerge.demo.run import BASE_PACKAGE
from polymerge.demo.skills import Skill, demo_skills
from polymerge.demo.train import TrainSettings, load_base, save, train
from polymerge.host import cache_folder
from polymerge.sources.gguf import package_gguf, unpack
from tests.fine_tunes import Original

BEGIN, END = "<|answer|>", "<|/answer|>"
SETTINGS = TrainSettings(steps=16, batch=4, learning_rate=3e-4, warmup=3)
# Each learns one of the demo's skills.
CHATS: dict[str, dict[str, Any]] = {
    "chatml": {
        "skill": "json",
        "template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + BEGIN + "{% endif %}",
        "end": END,
        # A token begins as another that means the like; the mean of all rows would take long to be said.
        "added": {BEGIN: "<|im_start|>", END: "<|im_end|>"},
    },
    "plain": {
        "skill": "math",
        "template": "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### answer:\n{% endif %}",
        "end": "<|endoftext|>",
        "added": [],
    },
}


def skill_of(name: str) -> Skill:
    """What a fine-tune has learnt."""
    return next(skill for skill in demo_skills(train=64, test=8) if skill.name == CHATS[name]["skill"])


def two_chats() -> dict[str, Original]:
    """The fine-tunes' folders, as transformers opens them."""
    base = unpack(package_gguf(BASE_PACKAGE), label=f"package:{BASE_PACKAGE}")
    return {name: Original(_fine_tune(name, base)) for name in CHATS}


def _fine_tune(name: str, base: Path) -> Path:
    chat, skill = CHATS[name], skill_of(name)
    said = {"chat": chat, "skill": asdict(skill), "settings": asdict(SETTINGS), "base": base.name, "version": 1}
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    target = cache_folder() / "tests" / f"{name}-{key}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, tokenizer = load_base(base)
    tokenizer.add_tokens(list(chat["added"]), special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = chat["template"], chat["end"]
    if chat["added"]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = model.get_input_embeddings().weight.data
        table[-len(chat["added"]) :] = table[tokenizer.convert_tokens_to_ids(list(chat["added"].values()))]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    encoded = [_encode(tokenizer, example.prompt, example.answer) for example in skill.train]
    train(model, encoded, tokenizer.pad_token_id, SETTINGS, name)
    save(model, tokenizer, target)
    return target


def _encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    messages = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return before, [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
