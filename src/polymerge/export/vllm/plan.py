"""What vLLM can express of a bundle, and what not: decided from headers and small tensors, before anything is written.

vLLM adds B (A x) to a linear layer's output, and in some architectures to an embedding's and the head's. An expert's
norm can stand in the columns of the linear layers that read it (`norms`). Biases and what else is its own stay out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...bundle.bundle import Bundle
from ...bundle.manifest import BundleLayer
from ...bundle.peft import is_fused
from ...engine.vllm.folder import EMBEDDING_ARCHITECTURES, LORA_RANKS, padded_rank
from ...errors import ModelError
from ...host import DTYPES
from ...sources.checkpoint import natural_key
from ...sources.persona import Persona, end_tokens, load_tokenizer, same_words
from .norms import gain_ratio, norm_modules, norm_readers

# For a bundle without low-rank residuals (compress rate 0 or 1).
DEFAULT_RANK = 64
HEAD = "lm_head"


@dataclass(frozen=True)
class Factored:
    """One pair of factors to be made.

    Attributes:
        layer: the tensor that they change.
        module: where they apply; for a tied embedding the tensor is the head's too.
        norm: the norm whose own gain is folded in.
        embedding: the factors look tokens up instead of multiplying.
    """

    layer: BundleLayer
    module: str
    rank: int
    norm: str | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of what they are added to."""
        rows, columns = self.layer.shape
        return (columns, rows) if self.layer.transposed or self.embedding else (rows, columns)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of A and B under their names in the adapter's file, without PEFT's prefix."""
        a, b = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        rows, columns = self.shape
        return {f"{self.module}.{a}": (self.rank, columns), f"{self.module}.{b}": (rows, self.rank)}

    @property
    def numel(self) -> int:
        """Numbers of both factors."""
        return self.rank * sum(self.shape)


@dataclass(frozen=True)
class VllmPlan:
    """What an export will write and what it cannot express.

    Attributes:
        max_lora_rank: of vLLM's launch; no factors are larger.
        experts: name -> factors to make, in the order of the file.
        norms: module of a norm that is folded -> its tensor.
        lost: one line for everything that stays out.
    """

    bundle: Bundle
    max_lora_rank: int
    experts: dict[str, list[Factored]]
    norms: dict[str, str]
    lost: tuple[str, ...]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.bundle.manifest.dtype]

    @cached_property
    def folded(self) -> dict[str, int]:
        """What goes into the factors although vLLM has no place for it: kind -> how often, over all experts."""
        ratios = sum(ratio != 1.0 for expert in self.experts for ratio in self.bundle.scales(expert).values())
        norms = {(e, task.norm) for e, tasks in self.experts.items() for task in tasks if task.norm}
        embeddings = sum(task.embedding or task.module == HEAD for tasks in self.experts.values() for task in tasks)
        counts = {"scale ratios": ratios, "norms": len(norms), "embeddings and heads": embeddings}
        return {kind: count for kind, count in counts.items() if count}

    @property
    def adapter_bytes(self) -> int:
        """Of all adapters' files."""
        return sum(task.numel for tasks in self.experts.values() for task in tasks) * self.dtype.itemsize

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last names of the modules that any expert changes."""
        return tuple(sorted({t.module.rpartition(".")[2] for tasks in self.experts.values() for t in tasks}))

    @property
    def slot_bytes(self) -> int:
        """What vLLM reserves for one loaded adapter: factors for all modules of these names, at `max_lora_rank`."""
        linear = [layer for layer in self.bundle.layers.values() if layer.role == "linear"]
        shapes = {layer.module: layer.shape for layer in linear}
        shapes |= {task.module: task.shape for tasks in self.experts.values() for task in tasks}
        widths = [sum(s) for module, s in shapes.items() if module.rpartition(".")[2] in self.target_modules]
        return sum(widths) * self.max_lora_rank * self.dtype.itemsize


def plan_vllm(bundle: Bundle | str | Path, *, max_rank: int | None = None) -> VllmPlan:
    """Says what an export can express, from headers and a few small tensors.

    Args:
        max_rank: vLLM's `--max-lora-rank`; by default the smallest that holds the bundle's own factors.

    Raises:
        ModelError: a rank that vLLM does not know, residuals of fused mixture-of-experts blocks, or an expert with
            a tokenizer, end tokens, positions or a vocabulary of its own.
    """
    bundle = Bundle.open(bundle)
    for expert in bundle.experts:
        _check_persona(bundle, expert)
    if max_rank is not None and max_rank not in LORA_RANKS:
        raise ModelError(f"rank {max_rank}: vLLM takes one of {', '.join(map(str, LORA_RANKS))}")
    linear = [layer for layer in bundle.layers.values() if layer.role == "linear"]
    fused = next((layer for layer in linear if is_fused(layer)), None)
    if fused:
        raise ModelError(
            f"{fused.tensor}: vLLM's adapters for mixture-of-experts blocks have another form, which is not written; "
            "export one expert with --to dense"
        )
    largest = max((_needed_rank(bundle, layer) for layer in linear), default=0)
    allowed = max_rank or padded_rank(largest or DEFAULT_RANK)
    expressed = _Expressed(bundle, allowed)
    experts = {expert: expressed.tasks(expert) for expert in bundle.experts}
    lost = list(expressed.lost)
    if largest > allowed:
        lost.append(f"all experts: residuals of rank up to {largest} are cut to rank {allowed}")
    norms = {layer.module: layer.tensor for layer in bundle.layers.values() if layer.role == "norm"}
    return VllmPlan(bundle, allowed, experts, norms, tuple(lost))


def _needed_rank(bundle: Bundle, layer: BundleLayer) -> int:
    """Of factors that are added to the average, which vLLM serves as the base: where that is the mean of adapters over
    one model, an expert's has all the others' in it."""
    if layer.base == "adapters":
        return min(sum(layer.ranks.values()), *layer.shape)
    return max(layer.rank_of(expert) for expert in bundle.experts)


def _check_persona(bundle: Bundle, expert: str) -> None:
    """Raises ModelError for what vLLM has once for all adapters: its adapters have had no tokenizers of their own since
    0.12, it ends answers at the base's end tokens, and knows the base's positions."""
    persona, base = bundle.persona(expert), bundle.persona()
    groups = bundle.manifest.experts[expert].persona
    unlike = {
        "tokenizer": "tokenizer" in groups and not _speak_alike(base, persona),
        "end tokens": end_tokens(persona.generation) != end_tokens(base.generation),
        "positions": "positions" in groups,
        "processor of images": "processor" in groups,
        "vocabulary": bool(bundle.vocabulary(expert) or bundle.manifest.experts[expert].rows),
    }
    for what in (what for what, differs in unlike.items() if differs):
        raise ModelError(
            f"expert {expert!r} has its own {what}, and vLLM has one for all adapters; serve the bundle as it is, "
            "remove the expert, or export it with --to dense"
        )


def _speak_alike(one: Persona, other: Persona) -> bool:
    """Whether two tokenizers are one to vLLM: they differ in a padding token, say."""
    first, second = load_tokenizer(one), load_tokenizer(other)
    return same_words(first, second) and first.eos_token_id == second.eos_token_id


class _Expressed:
    """Sorts what experts change into factors and losses.

    Attributes:
        lost: one line for everything that found no place.
    """

    def __init__(self, bundle: Bundle, rank: int) -> None:
        self.bundle, self.rank = bundle, rank
        self.lost: list[str] = []
        self._takes_embeddings = bundle.manifest.architecture in EMBEDDING_ARCHITECTURES
        linear = {layer.module for layer in bundle.layers.values() if layer.role == "linear"}
        self._takes = linear
        self._readers = norm_readers(bundle.path)
        self._norms = norm_modules(bundle.path)
        shapes = [bundle.adapter_shapes(expert) for expert in bundle.experts]
        over_adapters = {layer.module for layer in bundle.layers.values() if layer.base == "adapters"}
        # The average has a part of them, which is not the others'.
        self._averaged = {m for m in over_adapters if any(f"{m}.lora_A.weight" in its for its in shapes)}

    def tasks(self, expert: str) -> list[Factored]:
        """An expert's factors, in the order of an adapter's file."""
        stored, scales = self.bundle.adapter_shapes(expert), self.bundle.scales(expert)
        # Its own head takes the last norm in. For that norm alone an adapter on the head gains nothing (the demo's
        # experts have the same KL to two digits), fills a slot, and keeps vLLM from scoring prompts.
        own_head = any(self._is_head(layer) and _key(layer) in stored for layer in self.bundle.layers.values())
        folded = self._own_small(expert, own_head=own_head and self._takes_embeddings)
        tasks, whole = [], []
        for layer in self.bundle.layers.values():
            norm = folded.get(layer.module)
            replaced = _key(layer) in stored
            takes = layer.role == "linear" or (layer.role in ("embedding", "lm_head") and self._takes_embeddings)
            if replaced and takes and min(layer.shape) > self.rank:
                whole.append(layer.tensor)
            factored = f"{layer.module}.lora_A.weight" in stored or layer.module in self._averaged
            if layer.role == "linear" and (replaced or factored or norm or scales.get(layer.tensor, 1.0) != 1.0):
                tasks.append(self._task(layer, layer.module, norm))
            elif layer.role in ("embedding", "lm_head"):
                tasks += self._ends(expert, layer, replaced, folded.get(HEAD))
        if whole:
            self.lost.append(f"{expert}: {whole[0]}: {len(whole)} whole tensors beyond rank {self.rank}")
        return sorted(tasks, key=lambda task: natural_key(task.module))

    def _task(self, layer: BundleLayer, module: str, norm: str | None, *, embedding: bool = False) -> Factored:
        return Factored(layer, module, min(self.rank, *layer.shape), norm, embedding)

    def _ends(self, expert: str, layer: BundleLayer, replaced: bool, norm: str | None) -> list[Factored]:
        """An embedding or a head; the first may be both."""
        if replaced and not self._takes_embeddings:
            self.lost.append(f"{expert}: {layer.tensor}: vLLM takes no adapter there with this architecture")
            return []
        tasks = []
        if layer.role == "embedding" and replaced:
            tasks.append(self._task(layer, layer.module, None, embedding=True))
        if self._is_head(layer) and replaced:
            tasks.append(self._task(layer, HEAD, norm))
        return tasks

    def _is_head(self, layer: BundleLayer) -> bool:
        return layer.role == "lm_head" or layer.module == self.bundle.manifest.tied_embedding

    def _own_small(self, expert: str, *, own_head: bool) -> dict[str, str]:
        """Linear module -> the norm before it that is folded in. Other norms, biases and the like are lost."""
        takes = self._takes | ({HEAD} if own_head else set())
        reader = self.bundle.expert_reader(expert)
        folded: dict[str, str] = {}
        for layer in self.bundle.layers.values():
            if layer.role not in ("norm", "bias", "other"):
                continue
            theirs, base = reader.read(layer.tensor), self.bundle.base_tensor(layer.tensor)
            if torch.equal(theirs, base.to(theirs)):
                continue
            readers = self._readers.get(layer.module, []) if layer.parameter == "weight" else []
            if not readers:
                self.lost.append(f"{expert}: {layer.tensor}: {_NO_PLACE.get(layer.role, _NO_PLACE['other'])}")
            elif not takes.issuperset(readers):
                self.lost.append(f"{expert}: {layer.tensor}: {', '.join(readers)} cannot take it in")
            elif gain_ratio(self._norms[layer.module], theirs, base) is None:
                self.lost.append(f"{expert}: {layer.tensor}: the average's gain is too near 0 to divide by")
            else:
                folded |= dict.fromkeys(readers, layer.module)
        return folded


def _key(layer: BundleLayer) -> str:
    """Where an expert's own tensor stands in its adapter."""
    return f"{layer.module}.{layer.parameter}"


_NO_PLACE = {
    "norm": "not only linear layers read it",
    "bias": "vLLM's adapters have no biases",
    "other": "vLLM's adapters have no place for it",
}
