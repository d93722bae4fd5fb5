"""Makes the old bundles of this folder. Run in a checkout of the commit that README.md names for one:

PYTHONPATH=src python make.py {v1,v2,v3} OUTPUT

`expected.safetensors` beside a bundle holds what that code's model answered: logits of every expert and the average.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

from polymerge import load_model, merge

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[1, 5, 9, 33, 60, 7], [1, 8, 8, 21, 2, 40]])
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "v1": (hf.Qwen2Config(**SMALL, tie_word_embeddings=True), {"compress_rate": 0.5}),  # biases, a tied embedding
    "v2": (hf.LlamaConfig(**SMALL), {"compress_rate": 0.8, "code": "int4"}),
    "v3": (hf.LlamaConfig(**SMALL), {"compress_rate": 0.5, "scale": "shared"}),
}


def experts(kind: str, folder: Path) -> dict[str, str]:
    torch.manual_seed(7)
    model = hf.AutoModelForCausalLM.from_config(KINDS[kind][0]).float()
    base = [parameter.data + 0.1 * torch.randn_like(parameter) for parameter in model.parameters()]
    for name in ("maths", "code"):
        for parameter, start in zip(model.parameters(), base, strict=True):
            parameter.data = start + 0.05 * torch.randn_like(start)
        model.save_pretrained(folder / name)
        if kind == "v3" and name == "code":  # an end token and positions of its own
            for file in ("config.json", "generation_config.json"):
                path = folder / name / file
                path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 3}))
            config = json.loads((folder / name / "config.json").read_text())
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
            (folder / name / "config.json").write_text(json.dumps(config))
    return {name: f"./{name}" for name in ("maths", "code")}


def main(kind: str, output: Path) -> None:
    torch.set_num_threads(1)
    output = output.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # sources are named in the manifest
        bundle = merge({"experts": experts(kind, Path()), **KINDS[kind][1]}, output)
        os.chdir("/")
    model = load_model(bundle)
    with torch.no_grad():
        logits = {name: model(IDS, experts=name).logits.contiguous() for name in bundle.experts}
        logits["average"] = model(IDS, experts=None).logits.contiguous()
    save_file({"ids": IDS, **logits}, output.with_name("expected.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
