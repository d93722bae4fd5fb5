"""What an export changed, in the model's own words: KL between a bundle's expert and its exported adapter.

Runs both on one loaded bundle: the expert as `polymerge.model` computes it, and the average with the adapter's products
added where vLLM (and PEFT) add them. Knows nothing of how the adapter was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..bundle import ADAPTER_FILE, Bundle, adapter_name
from ..engine.hf_engine import HFEngine
from ..engine.vllm_folder import Probe, distance
from ..errors import ModelError, RecipeError

# Tokens of an answer that the expert writes itself where the calibration has none.
ANSWER_TOKENS = 24
BUILTIN = (
    "What is the capital of Norway, and what is it known for?",
    "Tom has 14 pens and buys 9 more. How many pens does he have?",
    "Write a Python function that reverses a list.",
    "List the files in the folder logs that are larger than 10 MB.",
    "An order for Mia: 3 lamps and 12 candles.",
    "Rewrite this sentence so that it is polite: Send me the report now.",
    "My card was charged twice for the same purchase. What should I do?",
    "Translate to French: The train leaves at seven in the morning.",
)
# Module -> (A, B); an embedding's A is looked up, every other one multiplied.
Adapter = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sample:
    """A prompt to measure on. Without an answer, the expert's own greedy one is used."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Measured:
    """What one expert's export changed; the names are those of `polymerge.engine.vllm_folder.ServedExpert`."""

    kl: float
    kl_unfolded: float
    kl_average: float
    same_token: float
    tokens: int
    probe: Probe


def builtin_samples() -> list[Sample]:
    """A handful of prompts of different kinds."""
    return [Sample(prompt) for prompt in BUILTIN]


def read_samples(file: Path) -> list[Sample]:
    """Prompts from a file: one a line, or JSON lines with `prompt` and perhaps `answer`.

    Raises:
        RecipeError: no such file, or a line that is neither.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot read the calibration prompts: {error}") from None
    samples = [_sample(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise RecipeError(f"{file}: holds no calibration prompts; write one a line")
    return samples


def _sample(file: Path, number: int, line: str) -> Sample:
    if not line.lstrip().startswith("{"):
        return Sample(line.strip())
    try:
        row = json.loads(line)
        return Sample(str(row["prompt"]), str(row["answer"]) if row.get("answer") else None)
    except (ValueError, KeyError, TypeError):
        raise RecipeError(f"{file}, line {number}: not a JSON object with `prompt`") from None


@torch.inference_mode()
def calibrate(
    bundle: Bundle,
    adapters: Mapping[str, Path],
    samples: Sequence[Sample],
    device: torch.device,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Measures every exported adapter on the answers' tokens.

    Args:
        adapters: expert -> folder of its exported adapter.
        progress: called with every expert that is done.
    """
    engine = HFEngine.from_bundle(bundle, device=str(device))
    found = {}
    for expert, folder in adapters.items():
        exported = read_adapter(load_file(folder / ADAPTER_FILE))
        unfolded = read_adapter(bundle.adapter(expert))
        rows = [_row(engine, expert, sample) for sample in samples]
        found[expert] = _measured(engine, expert, rows, exported, unfolded)
        if progress:
            progress(expert)
    return found


def check_tokenizer(bundle: Bundle) -> None:
    """Raises ModelError for a bundle whose tokenizer cannot be used."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(bundle.path, local_files_only=True)
    except Exception as error:  # transformers raises many types for one unusable folder
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{bundle.path}: no usable tokenizer, which vLLM needs too ({reason})") from None


def read_adapter(tensors: Mapping[str, Tensor]) -> Adapter:
    """The pairs of factors in an adapter's tensors; whole tensors and biases are left out, as vLLM does."""
    named = {adapter_name(key).removesuffix(".weight"): value for key, value in tensors.items()}
    pairs: Adapter = {}
    for key, a in named.items():
        module, _, part = key.rpartition(".")
        if part in ("lora_A", "lora_embedding_A"):
            pairs[module] = (a, named[f"{module}.{part.replace('_A', '_B')}"])
    return pairs


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Adds B (A x) to the output of every module of the adapter."""

    def hook(a: Tensor, b: Tensor, embedding: bool) -> Any:
        def added(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            x = inputs[0]
            return output + (F.embedding(x, a.T) if embedding else x @ a.T) @ b.T

        return added

    base: Any = model
    embedding = base.get_input_embeddings()
    hooks = []
    for name, factors in adapter.items():
        module = model.get_submodule(name)
        a, b = (factor.to(device=base.device, dtype=base.dtype) for factor in factors)
        hooks.append(module.register_forward_hook(hook(a, b, module is embedding)))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _row(engine: HFEngine, expert: str, sample: Sample) -> tuple[list[int], int]:
    """Token ids of a prompt with its answer, and where the answer begins."""
    prompt = engine.chat_prompt([{"role": "user", "content": sample.prompt}])[-engine.max_length // 2 :]
    if not prompt:
        raise ModelError(f"the calibration prompt {sample.prompt!r} has no tokens in the bundle's tokenizer")
    if sample.answer is not None:
        answer = engine.encode(sample.answer, special=False)[: engine.max_length // 2 - 1]
        return [*prompt, *answer], len(prompt)
    ids = torch.tensor([prompt], device=engine.device)
    made = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), experts=expert, max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    return made[0].tolist(), len(prompt)


def _measured(
    engine: HFEngine, expert: str, rows: Sequence[tuple[list[int], int]], exported: Adapter, unfolded: Adapter
) -> Measured:
    hf = engine.model.hf
    sums, tokens, same = dict.fromkeys(("exported", "unfolded", "average"), 0.0), 0, 0
    probes = []
    for ids, start in rows:
        truth = _log_probabilities(engine, ids, expert)
        others = {"average": _log_probabilities(engine, ids, None)}
        for name, adapter in (("exported", exported), ("unfolded", unfolded)):
            with applied(hf, adapter):
                others[name] = _log_probabilities(engine, ids, None)
        answer = slice(max(start - 1, 0), None)
        for name, other in others.items():
            sums[name] += float((truth.exp() * (truth - other))[answer].sum())
        tokens += len(truth[answer])
        same += int((truth.argmax(-1) == others["exported"].argmax(-1))[answer].sum())
        probes.append(_probe(ids, others["exported"], others["average"]))
    means = {name: max(total, 0.0) / max(tokens, 1) for name, total in sums.items()}
    probe = max(probes, key=lambda probe: distance(probe.expert, probe.average))
    return Measured(means["exported"], means["unfolded"], means["average"], same / max(tokens, 1), tokens, probe)


def _probe(ids: list[int], exported: Tensor, average: Tensor) -> Probe:
    tokens = torch.tensor(ids[1:], device=exported.device)[:, None]
    found, base = (tuple(x.gather(1, tokens)[:, 0].tolist()) for x in (exported, average))
    return Probe(ids=tuple(ids), expert=found, average=base)


def _log_probabilities(engine: HFEngine, ids: list[int], expert: str | None) -> Tensor:
    """[T - 1, V], float32: of every token but the first."""
    rows = torch.tensor([ids], device=engine.device)
    logits: Tensor = engine.model(rows, experts=expert, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)
