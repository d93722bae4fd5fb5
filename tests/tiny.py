"""Random tiny checkpoints of many architectures. For tests only: no published figure comes from these."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

VOCAB = 96
COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**COMMON),
    "llama-tied": lambda: hf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**COMMON),
    "qwen3": lambda: hf.Qwen3Config(**COMMON, head_dim=12),
    "gemma3": lambda: hf.Gemma3TextConfig(**COMMON, head_dim=12, sliding_window=64),
    "phi3": lambda: hf.Phi3Config(**COMMON),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=48,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "mixtral": lambda: hf.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **COMMON, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40
    ),
}


def make_experts(
    architecture: str,
    folder: Path,
    *,
    count: int = 3,
    seed: int = 0,
    spread: float = 0.05,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **save: Any,
) -> dict[str, Path]:
    """`count` checkpoints that share a base and differ in every parameter: {"e0": folder, ...}."""
    torch.manual_seed(seed)
    config = config or ARCHITECTURES[architecture]()
    model = hf.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():  # the default initialisation leaves biases at 0 and norms at 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    base = [parameter.data.clone() for parameter in model.parameters()]
    paths = {}
    for number in range(count):
        for parameter, start in zip(model.parameters(), base, strict=True):
            parameter.data = start + spread * torch.randn_like(start)
        path = folder / f"{architecture}-{seed}-{number}"
        model.to(dtype).save_pretrained(path, **save)
        model.float()
        paths[f"e{number}"] = path
    return paths


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One word a token: "w3" is token 3; 0 pads, 1 begins and 2 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(3, VOCAB)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One byte a token, of those that make "a" to "t", spaces and many longer characters; special tokens as in
    `tiny_tokenizer`. Random tokens of it are mostly no whole characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    leads = [0xC2, 0xC3, 0xCE, 0xD0, 0xE3, 0xE6, 0xE7, 0xF0]
    known = [*range(ord("a"), ord("u")), ord(" "), *range(0x80, 0xC0), *leads]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letters[byte]: 3 + n for n, byte in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def letters_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE with a merge, as llama.cpp has it: one printable letter a token, JSON's all, and "ab"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "ab", "\u0120", *"{}", *sorted(set(map(chr, range(0x21, 0x7F))) - set("{}"))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words[:VOCAB])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def recipe_folder(folder: Path, rows: Sequence[dict[str, str]], **settings: int) -> Path:
    """The folder, with two tiny Llamas, `recipe.yaml` that names them and `prompts.jsonl` with the rows."""
    experts = make_experts("llama", folder, count=2, config=hf.LlamaConfig(**COMMON | settings))
    for path in experts.values():
        tiny_tokenizer().save_pretrained(path)
    (folder / "recipe.yaml").write_text("experts:\n" + "".join(f"  {n}: {path}\n" for n, path in experts.items()))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> hf.PreTrainedTokenizerFast:
    """One byte a token, of all 256, so that it can write anything; special tokens as in `tiny_tokenizer`, and a chat
    template that knows no tools. With merges it is one that llama.cpp has, too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *letters, *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def text_model(tokenizer: hf.PreTrainedTokenizerFast, seed: int = 0) -> Any:
    """A random model of two layers that knows the tokenizer's words."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16384, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()
