"""What adapters of a runtime can express of a bundle's experts, and what not: decided from headers and small tensors.

An adapter adds B (A x) to a linear layer's output, and in some runtimes to an embedding's and the head's. An expert's
norm can stand in the columns of the linear layers that read it (`vllm/norms.py`), a ratio in the factors. Knows what
one runtime has once for all adapters, and its place for embeddings; does not know its files or how it is started.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.adapter import adapter_shapes
from ..bundle.bundle import Bundle
from ..bundle.layer import BundleLayer
from ..bundle.peft import is_fused
from ..errors import ModelError
from ..sources.checkpoint import natural_key
from ..sources.layers import meta_model
from ..sources.persona import Persona, end_tokens, load_tokenizer, same_words
from .vllm.norms import gain_ratio, norm_modules, norm_readers

HEAD = "lm_head"


@dataclass(frozen=True)
class Runtime:
    """What adds adapters to the average.

    Attributes:
        name: as errors say it.
        takes_embeddings: adapters may change the embedding and the head.
        whole: a tensor of an expert's own gets the rank that holds it exactly, whatever the others' rank.
        negligible: a small tensor that has no place is no loss where it differs from the average's by at most so much,
            as a share of its norm.
    """

    name: str
    takes_embeddings: bool
    whole: bool = False
    negligible: float = 0.0


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


def needed_rank(bundle: Bundle, layer: BundleLayer) -> int:
    """Of factors that are added to the average, which is served as the base: where that is the mean of adapters over
    one model, an expert's has all the others' in it."""
    if layer.base == "adapters":
        return min(sum(layer.ranks.values()), *layer.shape)
    return max(layer.rank_of(expert) for expert in bundle.experts)


def check_layers(bundle: Bundle, runtime: Runtime) -> list[BundleLayer]:
    """The linear layers. Raises ModelError for fused blocks, whose adapters have another form."""
    linear = [layer for layer in bundle.layers.values() if layer.role == "linear"]
    fused = next((layer for layer in linear if is_fused(layer)), None)
    if fused:
        raise ModelError(
            f"{fused.tensor}: {runtime.name}'s adapters for mixture-of-experts blocks have another form, which is not "
            "written; export one expert with --to dense"
        )
    return linear


def folded_counts(bundle: Bundle, experts: Mapping[str, Sequence[Factored]]) -> dict[str, int]:
    """What goes into the factors although adapters have no place for it: kind -> how often, over all experts."""
    ratios = sum(ratio != 1.0 for expert in experts for ratio in bundle.scales(expert).values())
    norms = {(e, task.norm) for e, tasks in experts.items() for task in tasks if task.norm}
    embeddings = sum(task.embedding or task.module == HEAD for tasks in experts.values() for task in tasks)
    counts = {"scale ratios": ratios, "norms": len(norms), "embeddings and heads": embeddings}
    return {kind: count for kind, count in counts.items() if count}


def check_persona(bundle: Bundle, expert: str, runtime: Runtime) -> None:
    """Raises ModelError for what a runtime has once for all adapters: vLLM's have had no tokenizers of their own since
    0.12, llama.cpp's never had; answers end at the base's end tokens, and positions are the base's."""
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
            f"expert {expert!r} has its own {what}, and {runtime.name} has one for all adapters; serve the bundle as "
            "it is, remove the expert, or export it with --to dense"
        )


def _speak_alike(one: Persona, other: Persona) -> bool:
    """Whether two tokenizers are one to a runtime: they differ in a padding token, say."""
    first, second = load_tokenizer(one), load_tokenizer(other)
    return same_words(first, second) and first.eos_token_id == second.eos_token_id


class Expressed:
    """Sorts what experts change into factors and losses.

    Attributes:
        lost: one line for everything that found no place.
        negligible: one line for what found none either, and is the average's within rounding.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, rank: int) -> None:
        self.bundle, self.rank, self.runtime = bundle, rank, runtime
        self.lost: list[str] = []
        self.negligible: list[str] = []
        self._takes_embeddings = runtime.takes_embeddings
        linear = {layer.module for layer in bundle.layers.values() if layer.role == "linear"}
        self._takes = linear
        model = meta_model(bundle.path)
        self._others, self._readers, self._norms = _other_tables(model), norm_readers(model), norm_modules(model)
        shapes = [adapter_shapes(bundle, expert) for expert in bundle.experts]
        over_adapters = {layer.module for layer in bundle.layers.values() if layer.base == "adapters"}
        # The average has a part of them, which is not the others'.
        self._averaged = {m for m in over_adapters if any(f"{m}.lora_A.weight" in its for its in shapes)}

    def tasks(self, expert: str) -> list[Factored]:
        """An expert's factors, in the order of an adapter's file."""
        stored, scales = adapter_shapes(self.bundle, expert), self.bundle.scales(expert)
        # Its own head takes the last norm in. For that norm alone an adapter on the head gains nothing (the demo's
        # experts have the same KL to two digits), fills a slot, and keeps vLLM from scoring prompts.
        own_head = any(self._is_head(x) and _changed(x, stored, scales) for x in self.bundle.layers.values())
        folded = self._own_small(expert, own_head=own_head and self._takes_embeddings)
        tasks: list[Factored] = []
        whole: list[BundleLayer] = []
        for layer in self.bundle.layers.values():
            norm = folded.get(layer.module)
            replaced = _key(layer) in stored
            exact = _exact_rank(layer, expert) if replaced and self.runtime.whole else None
            takes = layer.role == "linear" or (layer.role in ("embedding", "lm_head") and self._takes_embeddings)
            if replaced and takes and not self.runtime.whole and min(layer.shape) > self.rank:
                whole.append(layer)
            factored = f"{layer.module}.lora_A.weight" in stored or layer.module in self._averaged
            if layer.role == "linear" and (replaced or factored or norm or scales.get(layer.tensor, 1.0) != 1.0):
                tasks.append(self._task(layer, layer.module, norm, exact))
            elif layer.role in ("embedding", "lm_head"):
                changed = _changed(layer, stored, scales)
                tasks += self._ends(expert, layer, changed, folded.get(HEAD), exact)
        if whole:
            count = f"{len(whole)} whole tensors beyond rank {self.rank}"
            self.lost.append(f"{expert}: {whole[0].tensor}: {count} ({_cure(whole)})")
        return sorted(tasks, key=lambda task: natural_key(task.module))

    def _task(
        self, layer: BundleLayer, module: str, norm: str | None, exact: int | None, *, embedding: bool = False
    ) -> Factored:
        return Factored(layer, module, exact or min(self.rank, *layer.shape), norm, embedding)

    def _ends(
        self, expert: str, layer: BundleLayer, changed: bool, norm: str | None, exact: int | None
    ) -> list[Factored]:
        """An embedding or a head; the first may be both."""
        takes = self._takes_embeddings and layer.module not in self._others
        if changed and not takes:
            self.lost.append(
                f"{expert}: {layer.tensor}: {self.runtime.name} takes no adapter there with this architecture"
            )
            return []
        tasks = []
        if layer.role == "embedding" and changed:
            tasks.append(self._task(layer, layer.module, None, exact, embedding=True))
        if self._is_head(layer) and changed:
            tasks.append(self._task(layer, HEAD, norm, exact))
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
            why = None
            if not readers:
                why = _NO_PLACE.get(layer.role, _NO_PLACE["other"]).format(self.runtime.name)
            elif not takes.issuperset(readers):
                why = f"{', '.join(readers)} cannot take it in"
            elif gain_ratio(self._norms[layer.module], theirs, base) is None:
                why = "the average's gain is too near 0 to divide by"
            else:
                folded |= dict.fromkeys(readers, layer.module)
            if why:
                lost = _share(theirs, base) > self.runtime.negligible
                (self.lost if lost else self.negligible).append(f"{expert}: {layer.tensor}: {why}")
        return folded


def _other_tables(model: Any) -> set[str]:
    """Modules of tables that look up something else than the text's tokens: positions, or a layer's own of tokens."""
    if model is None:
        return set()
    table = model.get_input_embeddings()
    return {name for name, part in model.named_modules() if isinstance(part, nn.Embedding) and part is not table}


def _cure(whole: Sequence[BundleLayer]) -> str:
    """What lets an expert's whole tensors into an adapter."""
    roles = {layer.role for layer in whole}
    keys = {"embedding": "`embeddings: compress`", "lm_head": "`lm_head: compress`", "linear": "a higher rate for them"}
    merged = " and ".join(key for role, key in keys.items() if role in roles)
    return f"a higher --max-rank keeps more; merged with {merged} they have factors that fit"


def _exact_rank(layer: BundleLayer, expert: str) -> int:
    """That holds an expert's own tensor exactly: the table's rows that are its own, or all there is."""
    return min(layer.rows.get(expert, layer.shape[0]), *layer.shape)


def _share(theirs: Tensor, base: Tensor) -> float:
    """How far a tensor is from the average's, as a share of its norm."""
    norm = float(torch.linalg.vector_norm(base.double()))
    return float(torch.linalg.vector_norm(theirs.double() - base.double())) / norm if norm else float("inf")


def _key(layer: BundleLayer) -> str:
    """Where an expert's own tensor stands in its adapter."""
    return f"{layer.module}.{layer.parameter}"


def _changed(layer: BundleLayer, stored: Container[str], scales: Mapping[str, float]) -> bool:
    """Whether an expert has anything of its own there: a tensor, factors or a ratio."""
    factored = f"{layer.module}.lora_A.weight" in stored
    return factored or _key(layer) in stored or scales.get(layer.tensor, 1.0) != 1.0


_NO_PLACE = {
    "norm": "not only linear layers read it",
    "bias": "{}'s adapters have no biases",
    "other": "{}'s adapters have no place for it",
}
