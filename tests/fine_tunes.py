"""Tiny chat models that differ beside their weights: tokenizer, template, end token, settings. Random, for tests only.

What each must answer is said by transformers on the original alone (`Original`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.tiny import VOCAB, make_experts, tiny_tokenizer

PLAIN = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|> w5 {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> w6{% endif %}"
)
TEXT = "w20 w21 w22"
ROOM = 24


@dataclass(frozen=True)
class Original:
    """A fine-tune as transformers opens it."""

    path: Path

    @cached_property
    def tokenizer(self) -> Any:
        return hf.AutoTokenizer.from_pretrained(self.path)

    @cached_property
    def model(self) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(self.path).eval()

    def prompt(self, text: str = TEXT) -> list[int]:
        messages = [{"role": "user", "content": text}]
        ids: list[int] = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return ids

    def ids(self, text: str = TEXT) -> list[int]:
        """Of the greedy answer in a conversation, its end token among them."""
        ids = torch.tensor([self.prompt(text)])
        with torch.no_grad():
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ROOM, do_sample=False)
        new: list[int] = made[0, ids.shape[1] :].tolist()
        return new

    def answer(self, text: str = TEXT) -> str:
        """As text, without the token that ended it."""
        ids, ends = self.ids(text), self.model.generation_config.eos_token_id
        kept = ids[:-1] if ids[-1] in (ends if isinstance(ends, list) else [ends]) else ids
        answer: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return answer


def chatml_tokenizer() -> Any:
    """The words of `tiny_tokenizer` but for two, which are the tokens of ChatML; the second ends a text."""
    tokenizer = tiny_tokenizer()
    inside = json.loads(tokenizer.backend_tokenizer.to_str())
    words = inside["model"]["vocab"]
    for number, token in ((VOCAB - 2, "<|im_start|>"), (VOCAB - 1, "<|im_end|>")):
        del words[f"w{number}"]
        words[token] = number
    from tokenizers import Tokenizer

    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inside)),
        bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>", padding_side="left",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = CHATML
    return made


def fine_tunes(folder: Path, *, tokenizers: bool = True, ends: bool = True) -> dict[str, Original]:
    """`plain` and `chatml`: each ends its answer to TEXT at a token that the other does not end at.

    Args:
        tokenizers: off, both have one tokenizer, and other templates alone.
        ends: off, only the tokenizers say what ends an answer.
    """
    paths = make_experts("llama", folder, count=2, spread=0.08)
    plain = tiny_tokenizer()
    plain.chat_template = PLAIN
    chatml = chatml_tokenizer() if tokenizers else tiny_tokenizer()
    chatml.chat_template = CHATML if tokenizers else CHATML.replace("<|im_start|>", "w7").replace("<|im_end|>", "w8")
    made = {}
    for name, path, tokenizer in zip(("plain", "chatml"), paths.values(), (plain, chatml), strict=True):
        tokenizer.save_pretrained(path)
        made[name] = Original(path)
        if ends:
            _end_early(path, tokenizer)
    return made


def _end_early(path: Path, tokenizer: Any) -> None:
    """Lets a model end at a token that its greedy answer holds."""
    answer = Original(path).ids()
    after = max(place for place in range(len(answer)) if answer[place] not in answer[:place])
    settings = {"bos_token_id": 1, "eos_token_id": [tokenizer.eos_token_id, answer[after]], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(settings))
