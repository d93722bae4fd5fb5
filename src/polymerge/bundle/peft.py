"""An expert as a PEFT adapter: its configuration, its keys, and what PEFT needs beside the residuals.

Knows PEFT's LoRA format; does not know how files are written or how a residual was computed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..method.code import Code
from ..sources.checkpoint import natural_key
from .files import Entry
from .layer import BundleLayer

PEFT_PREFIX = "base_model.model."
# Where PEFT keeps an expert's own rows of an embedding: all of one that the output head is tied to, or a few.
TIED_ROWS = ".token_adapter.trainable_tokens_delta"
# What every residual has beside its weights' names where one of an adapter's has a bias.
BIASED_PAIR = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
# What PEFT would take for an adapter and read in part says a type of its own.
WHOLE_BLOCKS, SLICED_BLOCKS = "POLYMERGE_WHOLE_BLOCKS", "POLYMERGE_SLICED_BLOCKS"
NAMESAKES = "POLYMERGE_NAMESAKES: make a dense model of it with `polymerge export --to dense`"
LISTED_BLOCKS = "POLYMERGE_LISTED_BLOCKS: make a dense model of it with `polymerge export --to dense`"
AROUND_OTHERS = "POLYMERGE_AROUND_OTHERS: make a dense model of it with `polymerge export --to dense`"
FACTORED_TABLES = "POLYMERGE_TABLES: make a PEFT adapter of it with `polymerge export --to peft`"
# The two orders in which PEFT joins the matrices of a mixture's blocks that a checkpoint lists one by one.
_JOINED_BY_PEFT = ("mixtral", "qwen2_moe")
_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")


def adapter_name(stored: str) -> str:
    """A key of an adapter file under the model's own name: without PEFT's prefix, tied rows as the weight they are."""
    name = stored.removeprefix(PEFT_PREFIX)
    return f"{name.removesuffix(TIED_ROWS)}.weight" if name.endswith(TIED_ROWS) else name


def stored_name(name: str, by_rows: Container[str]) -> str:
    """The other way round: the key of a tensor in an adapter file that PEFT reads.

    Args:
        by_rows: modules of which the adapter has rows (`trainable_token_indices`).
    """
    module = name.removesuffix(".weight")
    return PEFT_PREFIX + (module + TIED_ROWS if module in by_rows and module != name else name)


def as_peft(
    tensors: Mapping[str, Tensor], layers: Iterable[BundleLayer], *, tied: tuple[str, str] | None
) -> dict[str, Tensor]:
    """An adapter's tensors (names of the model) with the factors of embeddings as PEFT has them: `lora_embedding_A`
    [r, V] and `lora_embedding_B` [H, r]. It takes none for two modules, so a head that is tied to an embedding gets the
    same pair as a linear layer has it.

    Args:
        tied: modules of an embedding and of the head that it is, if any.
    """
    renamed = dict(tensors)
    for layer in (layer for layer in layers if layer.rank and layer.role == "embedding"):
        a, b = (renamed.pop(f"{layer.module}.lora_{factor}.weight", None) for factor in "AB")
        if a is None or b is None:
            continue
        renamed |= {f"{layer.module}.lora_embedding_A": b.T, f"{layer.module}.lora_embedding_B": a.T}
        if tied and tied[0] == layer.module:
            renamed |= {f"{tied[1]}.lora_A.weight": a, f"{tied[1]}.lora_B.weight": b}
    return renamed


def coded_config(code: Code) -> dict[str, Any]:
    """adapter_config.json of an expert whose residuals have a code that PEFT does not know.

    PEFT looks the type up and stops with it in its message, so the type says what to do; vLLM and others look for
    the keys of a LoRA and for its weights' file, and find neither.
    """
    return {"peft_type": f"POLYMERGE_{code.name.upper()}: make a PEFT adapter of it with `polymerge export --to peft`"}


def borrowed_config() -> dict[str, Any]:
    """adapter_config.json of an expert some of whose factors lie in another's file; PEFT would answer without them."""
    return {"peft_type": "POLYMERGE_SHARED: make a PEFT adapter of it with `polymerge export --to peft`"}


def missing_siblings(keys: Iterable[str], layers: Iterable[BundleLayer]) -> list[BundleLayer]:
    """Parameters that an adapter needs although they are the base's.

    PEFT's `modules_to_save` takes whole modules: with an expert's own weight it wants the bias too, and the other way
    round.
    """
    have = set(keys)
    layers = list(layers)
    whole = {layer.module for layer in layers if f"{layer.module}.{layer.parameter}" in have}
    missing = (layer for layer in layers if layer.module in whole and not layer.rank)
    return [layer for layer in missing if f"{layer.module}.{layer.parameter}" not in have]


def adapter_config(
    tensors: Iterable[tuple[str, Sequence[int]]],
    layers: Iterable[BundleLayer],
    *,
    tied_embedding: str | None,
    rows: Sequence[int] = (),
    kept: Mapping[str, Sequence[int]] = MappingProxyType({}),
    model_type: str | None = None,
) -> dict[str, Any]:
    """adapter_config.json for an adapter with these tensors (names of the model, shapes).

    Every module's own rank stands in `rank_pattern` and `alpha_pattern` with alpha = rank, so that the scale is
    1 under any reader's rule. Keys are escaped full names: PEFT matches them with `re.match(r"(.*\\.)?(key)$", name)`.
    An embedding that the head is tied to goes to `trainable_token_indices` (all of them), because PEFT's
    `modules_to_save` would leave the head with the base's weight, or want it stored twice. So does one of which the
    expert has but `rows` of its own, or those that `kept` names for its module.

    Args:
        model_type: of the average's configuration.
    """
    layers = list(layers)
    tables = {layer.module: layer.shape[0] for layer in layers if layer.role == "embedding"}
    ranks: dict[str, int] = {}
    whole: set[str] = set()
    looked_up: set[str] = set()
    tokens: dict[str, list[int]] = {}
    lora_bias = False
    for name, shape in sorted(tensors, key=lambda tensor: natural_key(tensor[0])):
        factor = _FACTOR.fullmatch(name)
        if factor:
            ranks[factor[1]] = shape[0] if (factor[2] or factor[3]) == "A" else shape[1]
            looked_up |= {factor[1]} if factor[3] else set()
        elif name.endswith(".lora_B.bias"):
            lora_bias = True
        elif tied_embedding and name == f"{tied_embedding}.weight" and shape[0] == tables.get(tied_embedding, shape[0]):
            tokens[tied_embedding] = list(range(shape[0]))
        elif is_few(name, shape, tables):
            module = name.removesuffix(".weight")
            tokens[module] = list(kept.get(module, rows))
        else:
            whole.add(name.rpartition(".")[0])
    by_module = {layer.module: layer for layer in layers if layer.role == "linear"}
    fused = {m: r for m, r in ranks.items() if m in by_module and is_fused(by_module[m])}
    # transformers 5 holds a mixture's matrices in one parameter, for which PEFT takes the general rank alone.
    rank = next(iter(fused.values()), None) or (Counter(ranks.values()).most_common(1)[0][0] if ranks else 1)
    rows_too = {layer.module for layer in layers if layer.rank} & (whole | tokens.keys())
    beyond = rows_too or (tables.keys() & ranks.keys()) - looked_up
    pattern = {re.escape(module): r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": FACTORED_TABLES if beyond else _peft_type(whole, ranks, by_module, model_type),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": lora_bias,
        "init_lora_weights": True,
        "fan_in_fan_out": any(layer.transposed for layer in by_module.values()),
        "target_modules": sorted(ranks, key=natural_key) or "dummy-target-modules",
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": sorted(whole, key=natural_key) or None,
        "trainable_token_indices": tokens or None,
    }


def _peft_type(
    stored: Collection[str], factored: Collection[str], layers: Mapping[str, BundleLayer], model_type: str | None
) -> str:
    """LORA, or a type that PEFT does not know and refuses, where it would leave out matrices of a block without a word:
    whole ones, those that a checkpoint stores in one tensor, and others of their names; or could not open what it has
    no place for."""
    if any(layer.slice and (module in stored or module in factored) for module, layer in layers.items()):
        return SLICED_BLOCKS
    if any(is_fused(layer) and module in stored for module, layer in layers.items()):
        return WHOLE_BLOCKS
    fused = {module for module, layer in layers.items() if is_fused(layer)}
    if _has_namesakes(factored, fused):
        return NAMESAKES
    if not fused.isdisjoint(factored) and not _joins_blocks(model_type):
        return LISTED_BLOCKS
    return AROUND_OTHERS if around_others(stored, factored) else "LORA"


def _joins_blocks(model_type: str | None) -> bool:
    """Whether PEFT makes one pair of factors of those of a mixture's listed matrices, where transformers holds these in
    one parameter: for the architectures that transformers' own table leads to those it knows. A model that transformers
    does not know has them as they are stored."""
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as LIKE
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = model_type == "mixtral" or LIKE.get(model_type) in _JOINED_BY_PEFT
    return known or model_type not in CONFIG_MAPPING_NAMES


def _has_namesakes(factored: Collection[str], fused: Collection[str]) -> bool:
    """Whether a module with factors is called as those of block experts are, such as a dense layer's or a shared
    expert's `up_proj`. PEFT takes all of a name for parts of the blocks' one parameter, and leaves the factors of the
    others out."""
    inside, outside = ({m.rpartition(".")[2] for m in factored if (m in fused) is within} for within in (True, False))
    return not inside.isdisjoint(outside)


def around_others(stored: Collection[str], factored: Iterable[str]) -> str | None:
    """A module with own numbers that lies around another of the adapter's, such as a Mamba's mixer; None where none
    does. PEFT copies it with all that is in it, and then looks for every one of these."""
    around = {outer for module in {*stored, *factored} for outer in _outer(module)}
    return next((module for module in sorted(stored, key=natural_key) if module in around), None)


def _outer(module: str) -> Iterator[str]:
    """The modules around a module."""
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def is_few(name: str, shape: Sequence[int], tables: Mapping[str, int]) -> bool:
    """Whether a tensor is some rows of a table.

    Args:
        tables: module of an embedding -> its rows.
    """
    module = name.removesuffix(".weight")
    return module in tables and shape[0] < tables[module]


def is_fused(layer: BundleLayer) -> bool:
    """Whether the tensor is one matrix of a parameter that transformers holds fused (mixture-of-experts blocks)."""
    apart = layer.module == layer.tensor.removesuffix(".weight") and ".experts." in layer.module
    return apart or layer.slice is not None


def missing_zeros(shapes: Mapping[str, Sequence[int]], layers: Iterable[BundleLayer]) -> list[Entry]:
    """Zeros that an adapter with these tensors needs (names of the model).

    PEFT's `lora_bias` is one switch for the whole adapter: with one bias, every factor pair needs one, and the other
    way round a bias needs a factor pair.
    """
    needed = []
    taken = (x for x in layers if x.role == "linear" or (x.role == "lm_head" and x.rank))
    for layer in (layer for layer in taken if not layer.slice):
        rows, columns = layer.matrix_shape
        a, b, bias = (f"{layer.module}.{part}" for part in BIASED_PAIR)
        if a in shapes and bias not in shapes:
            needed.append(Entry(bias, "F32", (rows,), 4 * rows))
        if bias in shapes and a not in shapes:
            needed += [Entry(a, "F32", (1, columns), 4 * columns), Entry(b, "F32", (rows, 1), 4 * rows)]
    return needed if any(key.endswith(".lora_B.bias") for key in shapes) else []
