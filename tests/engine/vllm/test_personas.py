"""Templates and settings of experts whose tokenizer is the average's travel beside their adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polymerge import merge
from polymerge.engine.vllm.api import VllmApi
from polymerge.engine.vllm.engine import VllmEngine
from polymerge.engine.vllm.folder import read_note
from polymerge.export import plan_vllm, write_vllm
from polymerge.export.vllm.prompts import CalibrationPrompt
from tests.engine.vllm.fake import fake_vllm
from tests.fine_tunes import TEXT, fine_tunes


@pytest.mark.usefixtures("one_thread")
def test_our_engine_renders_each_expert_s_own_template(tmp_path: Path) -> None:
    originals = fine_tunes(tmp_path, tokenizers=False, ends=False)
    file = originals["chatml"].path / "generation_config.json"
    file.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.3}))
    sources = {name: str(original.path) for name, original in originals.items()}
    bundle = merge({"experts": sources, "compress_rate": 0.6}, tmp_path / "bundle")
    export = write_vllm(plan_vllm(bundle), tmp_path / "vllm", samples=[CalibrationPrompt("w5 w6")], device="cpu")
    note = read_note(export.folder)
    assert {name: expert.persona for name, expert in note.experts.items()} == {
        "plain": (), "chatml": ("template", "generation")
    }  # fmt: skip
    assert "persona" not in json.loads((export.folder / "polymerge-vllm.json").read_text())["experts"]["plain"]
    with fake_vllm(["plain", "chatml", "average"], lambda body: {}) as url:
        engine = VllmEngine(export.folder, VllmApi(url))
        messages = [{"role": "user", "content": TEXT}]
        for name, original in originals.items():
            assert engine.chat_prompt(messages, expert=name) == original.prompt()
        assert engine.chat_prompt(messages) == originals["plain"].prompt()
        assert [engine.defaults_of(name).temperature for name in ("plain", "chatml", None)] == [1.0, 0.3, 1.0]
