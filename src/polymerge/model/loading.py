"""From a bundle to a running model: transformers loads the base, it is tried, and every layer that an expert changes is
put in its place (`polymerge.model.placing`).
"""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.bundle import Bundle
from ..bundle.layer import BundleLayer
from ..bundle.reading import steady
from ..errors import ModelError
from ..host import DTYPES, free_memory, pick_device, pick_dtype
from ..sources.classes import opener_of
from ..sources.dense import dense_model
from ..sources.layers import meta_model
from ..sources.packed import PackedCheckpoint
from .assignment import Assignment
from .base_weights import BaseWeights
from .divergence import divergence, in_words, log_probabilities
from .held import Held, held_as, stays_packed
from .holders import Placed
from .mixed import MixedModel
from .placing import CodedPlacer, FusedPlacer, Placer
from .positions import place_positions
from .quantised import Base, check_base, hold_packed, holds, quantization_config
from .sampled import check_layers
from .trial import Trial
from .vocabulary import Vocabularies, place_vocabularies, tokens_of

logger = logging.getLogger(__name__)


def load_model(
    bundle: Bundle | str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    residuals: Held | str = "decoded",
    base: Base | str = "16bit",
    beside: MixedModel | None = None,
) -> MixedModel:
    """Loads a bundle as one torch module whose every row of a batch has its own expert.

    Args:
        device: by default the GPU where there is one.
        dtype: by default float32 on a CPU (bfloat16 products are hundreds of times slower on most) and the
            bundle's own on a GPU.
        trust_remote_code: let the bundle's own modelling code run, for architectures that transformers does not know.
        residuals: `packed` leaves the factors of linear layers in memory as they are stored, where int4's take a
            quarter of what they take `decoded`. On a GPU, kernels read them, which are checked first; where these
            cannot be used a layer's factors are decoded whenever it is run, and a warning says why. An entropy coder's
            are decoded all the same, which a warning says too.
        base: a bundle whose base is stored in `int8` (`polymerge quantize`) is held so with `int8`, and with `16bit` as
            the numbers that it stands for; one in `int4` in this way alone. Of any other, `int8`, `nf4`, `int4` or
            `fp8` holds the average's linear layers quantised, by transformers and the libraries of the extra
            `quantized`; embeddings, heads and residuals stay as they are. How far that moves the answers is measured
            against the 16-bit bundle, which is loaded first, and logged.
        beside: a model of the same average, with other experts: its weights of the average are this one's too, in one
            copy, where device, dtype and the way to hold them are the same. What is read are the experts' files.
            One of another average is refused.

    Raises:
        BundleError: incomplete or unsafe, or changed by another process meanwhile. ModelError: an adapter holds
            something that has no place in the model, a layer computes something else than the bundle holds, or an
            unknown way to hold residuals or base; or the base cannot be quantised. MissingExtraError: the base's
            library is missing.
    """
    bundle = Bundle.open(bundle)
    if beside is not None and not isinstance(beside, MixedModel):
        raise ModelError(f"beside: a {type(beside).__name__} is no loaded bundle; give what `load_model` returned")
    place = pick_device(device)
    stored = bundle.manifest.base_code
    if stored is not None and base not in holds(stored):
        raise ModelError(
            f"{bundle.path}: its base is stored in {stored}; load it with base {', or '.join(holds(stored))}"
        )
    check_base(base, place)
    with steady(bundle):
        exact = None if base in ("16bit", stored) else _exact(bundle, place, dtype, trust_remote_code)
        model = _loaded(bundle, place, dtype, trust_remote_code, residuals, base, beside)
    if base != "16bit":
        model.base = base
    if base not in ("16bit", stored):
        model.base_divergence = divergence(exact, log_probabilities(model)) if exact else None
        logger.warning("base %s: %s", base, in_words(model.base_divergence))
    return model


def _packed_layers(bundle: Bundle, packed: PackedCheckpoint, hf: nn.Module) -> list[BundleLayer]:
    """Those that are a layer of the model; what is run with others in one tensor is held as what it stands for."""
    modules = dict(hf.named_modules(remove_duplicate=False))
    return [layer for layer in bundle.manifest.layers if packed.is_packed(layer.tensor) and layer.module in modules]


def _exact(
    bundle: Bundle, device: torch.device, dtype: torch.dtype | str | None, trust_remote_code: bool
) -> list[Tensor] | None:
    """What the 16-bit bundle says to the text of `polymerge.model.quantised`; None where it does not fit the device."""
    free = free_memory(device)
    if free is not None and free < bundle.sizes().total:
        return None
    exact = log_probabilities(_loaded(bundle, device, dtype, trust_remote_code, "decoded", "16bit"))
    gc.collect()  # a model whose forwards were taken refers to itself, and its room is needed now
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return exact


def _loaded(
    bundle: Bundle,
    place: torch.device,
    dtype: torch.dtype | str | None,
    trust_remote_code: bool,
    residuals: str,
    base: str,
    beside: MixedModel | None = None,
) -> MixedModel:
    bundle.base  # noqa: B018 (its index is checked before transformers joins paths with it)
    chosen = pick_dtype(dtype, place, DTYPES[bundle.manifest.dtype])
    placer = _placer(residuals, bundle, place, chosen)
    quantised: dict[str, Any] = {}
    if base != "16bit" and bundle.manifest.base_code is None:
        quantised = {"quantization_config": quantization_config(base, chosen), "device_map": {"": place}}
    packed = bundle.packed()
    whole = packed is None and base == "16bit"
    lender = _lender(beside, bundle, chosen, place) if whole else None
    lent = lender.model() if lender is not None else None
    hf: Any = _opened(bundle, packed, chosen, quantised, trust_remote_code=trust_remote_code) if lent is None else lent
    hf.eval().requires_grad_(False)
    if packed is not None and base != "16bit":
        hold_packed(hf, {x.module: packed.numbers(x.tensor) for x in _packed_layers(bundle, packed, hf)}, chosen)
    if not quantised:  # which is there already, and must not be moved
        hf.to(place)
    trial = lender.trial if lender is not None and lent is not None else Trial(hf)
    if trial.objection:
        hint = "" if chosen is torch.float32 else "; load it with dtype float32"
        raise ModelError(f"{bundle.path}: {type(hf).__name__} cannot be run as a bundle: {trial.objection}{hint}")
    weights = BaseWeights(hf, bundle.base_hashes(), trial) if whole else None
    state = Assignment(bundle.experts, place)
    rows = place_positions(hf, state, _with_positions(bundle, trust_remote_code))
    placing = placer(bundle, hf, state, chosen, trial, trust_remote_code=trust_remote_code)
    placed = placing.place()
    vocabularies = Vocabularies(
        bundle.experts, [bundle.vocabulary(expert) for expert in (*bundle.experts, None)], tokens_of(hf)
    )
    place_vocabularies(hf, state, vocabularies)
    placed = Placed([*placed.modules, *rows], placed.strategy)
    if weights is not None:
        weights.placed()
    model = MixedModel(hf, state, bundle, placed, vocabularies, trust_remote_code=trust_remote_code)
    model.base_weights = weights
    if not quantised:
        model.to(place)
    check_layers(model, bundle, placing.orders)
    return model


def _opened(
    bundle: Bundle, packed: PackedCheckpoint | None, dtype: torch.dtype, quantised: dict[str, Any], **trust: bool
) -> Any:
    """The average, by transformers. Raises ModelError."""
    from transformers import AutoConfig

    options: dict[str, Any] = {**trust, "local_files_only": True}
    try:
        if packed is not None:
            return dense_model(packed, dtype=dtype, **options)
        opener = opener_of(AutoConfig.from_pretrained(bundle.path, **options))
        return opener.from_pretrained(bundle.path, dtype=dtype, **options, **quantised)
    except Exception as error:  # an unknown architecture, or a configuration that the weights do not fit
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{bundle.path}: transformers cannot load it ({reason})") from None


def _lender(beside: MixedModel | None, bundle: Bundle, dtype: torch.dtype, device: torch.device) -> BaseWeights | None:
    """The weights of the average of a model that is loaded; None where they are held otherwise than this one's.

    Raises:
        ModelError: they are another average's.
    """
    weights = beside.base_weights if beside is not None else None
    if weights is None:
        return None
    if weights.hashes != bundle.base_hashes():
        raise ModelError(f"{bundle.path}: its average is not that of the model beside it; load it without `beside`")
    on = torch.device(device.type, torch.cuda.current_device()) if device == torch.device("cuda") else device
    return weights if weights.place == (dtype, on) else None


def _with_positions(bundle: Bundle, trust_remote_code: bool) -> list[nn.Module | None]:
    """For every expert a model without weights that has its positions; None where they are the bundle's."""
    model_of: dict[str, nn.Module | None] = {}
    models = []
    for expert in bundle.experts:
        persona = bundle.persona(expert)
        said = json.dumps(persona.positions, sort_keys=True)
        if said not in model_of and "positions" in bundle.manifest.experts[expert].persona:
            model_of[said] = meta_model(persona.config_folder, trust_remote_code=trust_remote_code)
            if model_of[said] is None:
                raise ModelError(f"{persona.config_folder}: transformers cannot read the positions of {expert!r}")
        models.append(model_of.get(said))
    return models


def _placer(residuals: str, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> type[Placer]:
    shapes = [layer.matrix_shape for layer in bundle.layers.values() if layer.rank]
    if held_as(residuals) == "decoded" or not shapes:
        return Placer
    if not stays_packed(residuals, bundle.code):
        logger.warning("%s: residuals in the code %s are decoded all the same", bundle.path, bundle.code.name)
        return Placer

    from .triton.check import objection

    reason = objection(shapes, bundle.code, device, dtype)
    if reason and device.type != "cpu":
        logger.warning("packed residuals are decoded whenever a layer is run, without the Triton kernels: %s", reason)
    return CodedPlacer if reason else FusedPlacer
