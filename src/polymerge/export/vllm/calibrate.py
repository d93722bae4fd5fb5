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
from ...engine.base import GenerateRequest
from ...engine.exported import Probe, distance
from ...engine.local.engine import HFEngine
from ...engine.local.forced import batches, read_together
from ...errors import ModelError
from ...model.mixed import MixedModel
from ..expressed import HEAD
from .inputs import summed
from .prompts import CalibrationPrompt

# Tokens of an answer that the expert writes itself where the calibration has none.
ANSWER_TOKENS = 24
# No column counts for less than this share of the middle one, so that dividing by its size is harmless.
SMALLEST_SIZE = 0.05
# Logits of texts that are read together, padding counted: 128 MB of them, and an export compares three readings.
LOGITS = 2**25
# Numbers of what an expert said that are kept until its export is measured: 256 MB.
KEPT = 2**26
# Token ids of a prompt with its answer, and where that begins.
Row = tuple[list[int], int]
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
        rows: Mapping[str, list[Row]] | None = None,
    ) -> None:
        self.bundle, self._samples = bundle, samples
        self._engine = HFEngine.from_bundle(bundle, device=str(device))
        self._rows: dict[str, list[Row]] = dict(rows or {})
        self._kept: tuple[str | None, list[list[Tensor]]] = (None, [])  # whose, and what it said of the first batches

    @torch.inference_mode()
    def input_sizes(self, expert: str, modules: Collection[str]) -> dict[str, Tensor]:
        """How large every column of a layer's input is: module -> root mean square [in], float32 on the CPU.

        Every token counts the same, however large its state is: the first of a text can be a thousand times larger.
        What the expert says of its answers meanwhile is kept for `measure`, as far as there is room.
        """
        rows, room = self.rows(expert), KEPT
        kept: list[list[Tensor]] = []
        with summed(self.model.hf, modules) as sums:
            for batch in self._batches(rows):
                sums.lengths = [len(ids) for ids, _ in batch]
                said = self._answers_as(expert, batch)
                room -= sum(of_row.numel() for of_row in said)
                if room >= 0:
                    kept.append(said)
        self._kept = (expert, kept)
        sizes = {name: total.sqrt().cpu() for name, total in sums.squares.items()}
        return {name: size.clamp(min=float(size.median()) * SMALLEST_SIZE) for name, size in sizes.items()}

    @torch.inference_mode()
    def measure(self, expert: str, folder: Path) -> Measured:
        """Compares an expert with its exported adapter on the answers' tokens."""
        layers, tied = self.bundle.layers.values(), self.bundle.manifest.tied_embedding
        unfolded = as_peft(adapter_of(self.bundle, expert), layers, tied=(tied, HEAD) if tied else None)
        readers = {
            "exported": read_adapter(load_file(folder / ADAPTER_FILE)),
            "unfolded": read_adapter(unfolded),
            "average": {},
        }
        kls, tokens, same, probes = dict.fromkeys(readers, 0.0), 0, 0, []
        for batch, truths in self._with_truths(expert):
            read = {}
            for name, adapter in readers.items():
                with applied(self.model.hf, adapter):
                    read[name] = self._logits(batch, None)
            for number, ((ids, start), truth) in enumerate(zip(batch, truths, strict=True)):
                said = {name: of_answer(rows[number], start) for name, rows in read.items()}
                for name, other in said.items():
                    kls[name] += float((truth.exp() * (truth - other)).sum())
                tokens += len(truth)
                same += int((truth.argmax(-1) == said["exported"].argmax(-1)).sum())
                probes.append(_probe(ids, read["exported"][number], read["average"][number]))
        means = {name: max(total, 0.0) / max(tokens, 1) for name, total in kls.items()}
        probe = max(probes, key=lambda probe: distance(probe.expert, probe.average))
        return Measured(means["exported"], means["unfolded"], means["average"], same / max(tokens, 1), tokens, probe)

    @torch.inference_mode()
    def truths(self, expert: str, rows: Sequence[Row] | None = None) -> Iterator[tuple[list[int], int, Tensor]]:
        """What an export must answer: token ids, where the answer begins, and the log-probabilities of the bundle's
        expert for every token of the answer (but a text's first), [n, V] float32 on the CPU.

        Args:
            rows: some of `rows`; by default all.
        """
        for batch in self._batches(self.rows(expert) if rows is None else rows):
            said = self._answers_as(expert, batch)
            yield from ((ids, start, of_row.cpu()) for (ids, start), of_row in zip(batch, said, strict=True))

    @property
    def model(self) -> MixedModel:
        """The loaded bundle."""
        model: MixedModel = self._engine.model
        return model

    def rows(self, expert: str) -> list[Row]:
        """Token ids of the prompts with their answers, and where these begin."""
        if expert not in self._rows:
            self._write()
        return list(self._rows[expert])

    def _write(self) -> None:
        """The rows of all experts that have none: the answers that their prompts lack are written together."""
        asked = [
            (expert, sample, _prompt(self._engine, expert, sample))
            for expert in self.bundle.experts
            if expert not in self._rows
            for sample in (self._samples[expert] if isinstance(self._samples, Mapping) else self._samples)
        ]
        written = iter(
            self._engine.written(
                [GenerateRequest(ids, expert, ANSWER_TOKENS) for expert, sample, ids in asked if sample.answer is None]
            )
        )
        for expert, sample, ids in asked:
            answer = _answer(self._engine, expert, sample.answer) if sample.answer is not None else next(written)
            self._rows.setdefault(expert, []).append(([*ids, *answer], len(ids)))

    def _with_truths(self, expert: str) -> Iterator[tuple[list[Row], list[Tensor]]]:
        whose, kept = self._kept
        for number, batch in enumerate(self._batches(self.rows(expert))):
            known = whose == expert and number < len(kept)
            yield batch, kept[number] if known else self._answers_as(expert, batch)

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows that are read together."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return batches(rows, lambda row: len(row[0]), together=LOGITS // vocabulary)

    def _answers_as(self, expert: str, batch: Sequence[Row]) -> list[Tensor]:
        """What an expert says of the answers of rows: [n, V] log-probabilities of each."""
        return [of_answer(said, start) for said, (_, start) in zip(self._logits(batch, expert), batch, strict=True)]

    def _logits(self, batch: Sequence[Row], expert: str | None) -> list[Tensor]:
        """[T - 1, V] of every row, of every token but the first."""
        model, ids = self.model, [ids for ids, _ in batch]
        said = read_together(ids, lambda ids: model(ids, experts=expert, use_cache=False).logits, model.device)
        return [of_row[:-1] for of_row in said]


def of_answer(logits: Tensor, start: int) -> Tensor:
    """Log-probabilities of an answer's tokens, float32 [n, V], of logits [T - 1, V] of all but a text's first.

    Args:
        start: which token of the text is the answer's first.
    """
    return logits[max(start - 1, 0) :].float().log_softmax(-1)


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


def _prompt(engine: HFEngine, expert: str, sample: CalibrationPrompt) -> list[int]:
    """Its end, where it is long."""
    prompt = engine.chat_prompt([{"role": "user", "content": sample.prompt}], expert=expert)
    if not prompt:
        raise ModelError(f"the calibration prompt {sample.prompt!r} has no tokens in the bundle's tokenizer")
    return prompt[-(engine.max_length // 2) :]


def _answer(engine: HFEngine, expert: str, answer: str) -> list[int]:
    """Its beginning, where it is long."""
    return engine.encode(answer, special=False, expert=expert)[: engine.max_length // 2 - 1]


def _probe(ids: list[int], exported: Tensor, average: Tensor) -> Probe:
    """Of logits [T - 1, V]."""
    tokens = torch.tensor(ids[1:], device=exported.device)[:, None]
    said = (logits.float() for logits in (exported, average))
    expert, base = (tuple((x.gather(1, tokens)[:, 0] - x.logsumexp(-1)).tolist()) for x in said)
    return Probe(ids=tuple(ids), expert=expert, average=base)
