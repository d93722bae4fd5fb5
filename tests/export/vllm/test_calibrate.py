"""What experts are measured on: their answers, the sizes of their layers' inputs, and how often a text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from polymerge import Bundle, merge
from polymerge.engine.base import GenerateRequest
from polymerge.engine.local.engine import HFEngine
from polymerge.export import plan_vllm, write_vllm
from polymerge.export.vllm import calibrate
from polymerge.export.vllm.calibrate import Calibration
from polymerge.export.vllm.prompts import CalibrationPrompt
from tests.tiny import make_experts, tiny_tokenizer

SAMPLES = [CalibrationPrompt("w5 w6 w7 w8 w9 w4"), CalibrationPrompt("w8 w9", answer="w10 w11 w12")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("calibrate")
    experts = make_experts("llama", folder, spread=0.02)
    tiny_tokenizer().save_pretrained(experts["e0"])
    sources = {name: str(path) for name, path in experts.items()}
    return merge({"experts": sources, "code": "factors", "compress_rate": 0.6}, folder / "bundle")


def test_experts_write_their_own_answers_though_they_write_together(bundle: Bundle) -> None:
    calibration, engine = Calibration(bundle, SAMPLES, CPU), HFEngine.from_bundle(bundle, device="cpu")
    answers = []
    for expert in bundle.experts:
        (text, start), (given, _) = calibration.rows(expert)
        alone = engine.written([GenerateRequest(text[:start], expert, calibrate.ANSWER_TOKENS)])
        assert text[start:] == alone[0] and 0 < len(alone[0]) <= calibrate.ANSWER_TOKENS
        assert given[-3:] == engine.encode("w10 w11 w12", special=False)
        answers.append(alone[0])
    assert len(set(map(tuple, answers))) == len(answers)


def test_padding_is_no_part_of_the_sizes(bundle: Bundle) -> None:
    calibration, modules = Calibration(bundle, SAMPLES, CPU), ["model.layers.1.mlp.down_proj", "lm_head"]
    rows = calibration.rows("e1")
    assert len({len(ids) for ids, _ in rows}) == len(rows) == 2
    sizes = calibration.input_sizes("e1", modules)
    for module in modules:
        seen = []
        hook = calibration.model.hf.get_submodule(module).register_forward_pre_hook(lambda _, x, s=seen: s.append(x[0]))
        for ids, _ in rows:
            calibration.model(torch.tensor([ids]), experts="e1", use_cache=False)
        hook.remove()
        tokens = torch.cat([x[0] for x in seen])
        alone = F.normalize(tokens, dim=-1).square().sum(0).sqrt()
        floor = float(alone.median()) * calibrate.SMALLEST_SIZE
        torch.testing.assert_close(sizes[module], alone.clamp(min=floor), atol=1e-5, rtol=1e-4)


def test_what_an_expert_said_while_its_inputs_were_seen_is_not_read_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_vllm(plan_vllm(bundle), tmp_path / "v", samples=SAMPLES).folder

    def measured(room: int) -> tuple[object, list[str | None]]:
        monkeypatch.setattr(calibrate, "KEPT", room)
        monkeypatch.setattr(calibrate, "LOGITS", 0)  # each text alone
        calibration = Calibration(bundle, SAMPLES, CPU)
        calibration.input_sizes("e1", ["lm_head"])
        logits, read = calibration._logits, list[str | None]()

        def noted(batch: Any, expert: str | None) -> list[torch.Tensor]:
            read.append(expert)
            return logits(batch, expert)

        monkeypatch.setattr(calibration, "_logits", noted)
        return calibration.measure("e1", written / "adapters" / "e1"), read

    kept, once = measured(2**26)
    again, twice = measured(0)
    assert kept == again
    assert once.count("e1") == 0 and twice.count("e1") == len(SAMPLES)
