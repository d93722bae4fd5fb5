"""What the layers of an expert see, and what an export changed: KL between a bundle's expert and its exported adapter.

Runs both on one loaded bundle: the expert as `polymerge.model` computes it, and the average with the adapter's products
added where vLLM (and PEFT) add them. Knows nothing of how the adapter is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ...bundle.adapter import adapter_of
from ...bundle.bundle import Bundle
from ...bundle.manifest import ADAPTER_FILE
from ...bundle.peft import adapter_name, as_peft
from ...engine.exported import Probe, distance
from ...engine.local.engine import HFEngine
from ...engine.local.forced import batches, read_together
from ...errors import ModelError
from ...model.mixed import MixedModel
from ..expressed import HEAD
from .prompts import CalibrationPrompt

# Tokens of an answer that the expert writes itself where the calibration has none.
ANSWER_TOKENS = 24
# No column counts for less than this share of the middle one, so that dividing by its size is harmless.
SMALLEST_SIZE = 0.05
# Logits of texts that are read together, padding counted: 128 MB of them, and an export compares four readings.
LOGITS = 2**25
# Module -> (A, B); an embedding's A is looked up, every other one multiplied.
Adapter = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Measured:
    """What one expert's export changed; the names are those of `ExportedExpert`."""

    kl: float
    kl_unfolded: float
    kl_average: float
    same_token: float
    tokens: int
    probe: Probe

    @property
    def noted(self) -> dict[str, Any]:
        """What an export writes down of it."""
        return {name: value for name, value in vars(self).items() if name != "tokens"}


class Calibration:
    """A loaded bundle and the answers that its experts are measured on.

    Args:
        samples: prompts, or those of every expert; an expert writes the answers that they lack itself.
        rows: expert -> token ids of prompts with their answers, and where these begin, where they are known.
    """

    def __init__(
        self,
        bundle: Bundle,
        samples: Sequence[CalibrationPrompt] | Mapping[str, Sequence[CalibrationPrompt]],
        device: torch.device,
        rows: Mapping[str, list[tuple[list[int], int]]] | None = None,
    ) -> None:
        self.bundle, self._samples = bundle, samples
        self._engine = HFEngine.from_bundle(bundle, device=str(device))
        self._rows: dict[str, list[tuple[list[int], int]]] = dict(rows or {})

    @torch.inference_mode()
    def input_sizes(self, expert: str, modules: Collection[str]) -> dict[str, Tensor]:
        """How large every column of a layer's input is: module -> root mean square [in], float32 on the CPU.

        Every token counts the same, however large its state is: the first of a text can be a thousand times larger.
        """
        sums: dict[str, Tensor] = {}
        hooks = [
            self._engine.model.hf.get_submodule(name).register_forward_pre_hook(_summing(sums, name))
            for name in modules
        ]
        try:
            for ids, _ in self._answers(expert):  # each alone: padding would count
                _log_probabilities(self._engine, [ids], expert)
        finally:
            for hook in hooks:
                hook.remove()
        sizes = {name: total.sqrt().cpu() for name, total in sums.items()}
        return {name: size.clamp(min=float(size.median()) * SMALLEST_SIZE) for name, size in sizes.items()}

    @torch.inference_mode()
    def measure(self, expert: str, folder: Path) -> Measured:
        """Compares an expert with its exported adapter on the answers' tokens."""
        exported = read_adapter(load_file(folder / ADAPTER_FILE))
        layers, tied = self.bundle.layers.values(), self.bundle.manifest.tied_embedding
        unfolded = read_adapter(as_peft(adapter_of(self.bundle, expert), layers, tied=(tied, HEAD) if tied else None))
        return _measured(self._engine, expert, self._answers(expert), exported, unfolded)

    @torch.inference_mode()
    def truths(
        self, expert: str, rows: Sequence[tuple[list[int], int]] | None = None
    ) -> Iterator[tuple[list[int], int, Tensor]]:
        """What an export must answer: token ids, where the answer begins, and the log-probabilities of the bundle's
        expert for every token but the first, [T - 1, V] float32 on the CPU.

        Args:
            rows: some of `rows`; by default all.
        """
        for batch in _batches(self._engine, self._answers(expert) if rows is None else rows):
            said = _log_probabilities(self._engine, [ids for ids, _ in batch], expert)
            yield from ((ids, start, of_row.cpu()) for (ids, start), of_row in zip(batch, said, strict=True))

    @property
    def model(self) -> MixedModel:
        """The loaded bundle."""
        model: MixedModel = self._engine.model
        return model

    def rows(self, expert: str) -> list[tuple[list[int], int]]:
        """Token ids of the prompts with their answers, and where these begin."""
        return list(self._answers(expert))

    def _answers(self, expert: str) -> list[tuple[list[int], int]]:
        if expert not in self._rows:
            samples = self._samples[expert] if isinstance(self._samples, Mapping) else self._samples
            self._rows[expert] = _rows(self._engine, expert, samples)
        return self._rows[expert]


def _summing(sums: dict[str, Tensor], name: str) -> Any:
    """A hook that adds up the squares of a module's inputs, every token scaled to the same size."""

    def hook(module: nn.Module, inputs: Any) -> None:
        x = F.normalize(inputs[0].float().flatten(0, -2), dim=-1)  # [tokens, in]
        total = x.square().sum(0)
        sums[name] = sums[name] + total if name in sums else total

    return hook


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
            more: Tensor = (F.embedding(x, a.T) if embedding else x @ a.T) @ b.T
            # Gemma's module scales what it looks up, so the factors' part as well.
            return output + more * getattr(module, "embed_scale", 1.0) if embedding else output + more

        return added

    base: Any = model
    embedding = base.get_input_embeddings()
    hooks = []
    for name, factors in adapter.items():
        module = model.get_submodule(name)
        a, b = (factor.to(device=base.device, dtype=base.dtype) for factor in factors)
        hooks.append(module.register_forward_hook(hook(a, b, module is embedding or isinstance(module, nn.Embedding))))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _rows(engine: HFEngine, expert: str, samples: Sequence[CalibrationPrompt]) -> list[tuple[list[int], int]]:
    """Token ids of prompts with their answers, and where these begin. Missing answers are written in one batch."""
    half = engine.max_length // 2
    prompts = [_prompt(engine, expert, sample)[-half:] for sample in samples]
    unanswered = [prompt for prompt, sample in zip(prompts, samples, strict=True) if sample.answer is None]
    written = iter(_written(engine, expert, unanswered))
    rows = []
    for prompt, sample in zip(prompts, samples, strict=True):
        if sample.answer is None:
            answer = next(written)
        else:
            answer = engine.encode(sample.answer, special=False, expert=expert)[: half - 1]
        rows.append(([*prompt, *answer], len(prompt)))
    return rows


def _prompt(engine: HFEngine, expert: str, sample: CalibrationPrompt) -> list[int]:
    prompt = engine.chat_prompt([{"role": "user", "content": sample.prompt}], expert=expert)
    if not prompt:
        raise ModelError(f"the calibration prompt {sample.prompt!r} has no tokens in the bundle's tokenizer")
    return prompt


def _written(engine: HFEngine, expert: str, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The expert's greedy answers, each up to its end token."""
    if not prompts:
        return []
    ids, mask = engine.padded(prompts)
    made = engine.model.generate(
        ids, attention_mask=mask, experts=expert, max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    return [_up_to_end(row[ids.shape[1] :].tolist(), engine.defaults_of(expert).ends) for row in made]


def _up_to_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """What follows an end token is padding."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _measured(
    engine: HFEngine, expert: str, rows: Sequence[tuple[list[int], int]], exported: Adapter, unfolded: Adapter
) -> Measured:
    hf = engine.model.hf
    sums, tokens, same = dict.fromkeys(("exported", "unfolded", "average"), 0.0), 0, 0
    probes = []
    for batch in _batches(engine, rows):
        read = [ids for ids, _ in batch]
        truths = _log_probabilities(engine, read, expert)
        others = {"average": _log_probabilities(engine, read, None)}
        for name, adapter in (("exported", exported), ("unfolded", unfolded)):
            with applied(hf, adapter):
                others[name] = _log_probabilities(engine, read, None)
        for number, ((ids, start), truth) in enumerate(zip(batch, truths, strict=True)):
            answer = slice(max(start - 1, 0), None)
            for name, other in others.items():
                sums[name] += float((truth.exp() * (truth - other[number]))[answer].sum())
            tokens += len(truth[answer])
            same += int((truth.argmax(-1) == others["exported"][number].argmax(-1))[answer].sum())
            probes.append(_probe(ids, others["exported"][number], others["average"][number]))
    means = {name: max(total, 0.0) / max(tokens, 1) for name, total in sums.items()}
    probe = max(probes, key=lambda probe: distance(probe.expert, probe.average))
    return Measured(means["exported"], means["unfolded"], means["average"], same / max(tokens, 1), tokens, probe)


def _probe(ids: list[int], exported: Tensor, average: Tensor) -> Probe:
    tokens = torch.tensor(ids[1:], device=exported.device)[:, None]
    expert, base = (tuple(x.gather(1, tokens)[:, 0].tolist()) for x in (exported, average))
    return Probe(ids=tuple(ids), expert=expert, average=base)


def _batches(engine: HFEngine, rows: Sequence[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Rows that are read together."""
    vocabulary = engine.model.hf.config.get_text_config().vocab_size
    return batches(rows, lambda row: len(row[0]), together=LOGITS // vocabulary)


def _log_probabilities(engine: HFEngine, rows: Sequence[list[int]], expert: str | None) -> list[Tensor]:
    """[T - 1, V] of every row, float32: of every token but the first."""
    said = read_together(rows, lambda ids: engine.model(ids, experts=expert, use_cache=False).logits, engine.device)
    return [of_row[:-1].float().log_softmax(-1) for of_row in said]
