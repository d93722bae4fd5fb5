"""Before a server starts: every expert must answer a probe prompt as its dense reconstruction does, and not as the
average does. An adapter that is ignored, in part or in whole, is found here and not by users.

Knows logits; the reconstruction takes another way than the running model (dense tensors, transformers' own modules).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.stored import dense_state
from ..engine.local.engine import HFEngine
from ..errors import ModelError

logger = logging.getLogger("polymerge.serve")

PROBE = "Question: what is 12 + 30? List the files of a folder, and answer politely.\nAnswer:"
PROBE_TOKENS = 24
# How far the running model may be from the reconstruction, as a share of the logits' own size and of the distance
# between expert and average; the larger one counts. Rounding in half precision takes several percent of the latter.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.float16: (1e-2, 0.25), torch.bfloat16: (5e-2, 0.5)}


def probe(
    engine: HFEngine,
    bundle: Bundle,
    experts: Sequence[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Checks experts of a loaded bundle, by default all. Needs the memory of one more model for its time.

    Raises:
        ModelError: an expert does not answer as it should; one line that names it.
    """
    known = min(engine.model.vocabularies.of(expert) for expert in (None, *bundle.experts))
    ids = [token for token in engine.encode(PROBE) if token < known][:PROBE_TOKENS]
    average = _mixed(engine, ids, None)
    for expert in bundle.experts if experts is None else experts:
        if progress:
            progress(expert)
        mixed, dense = _mixed(engine, ids, expert), _dense(engine, bundle, ids, expert)
        _compare(expert, mixed[:, :known], dense[:, :known], average[:, :known])


def _compare(expert: str, mixed: Tensor, dense: Tensor, average: Tensor) -> None:
    """Logits [T, V] of one expert, of its reconstruction and of the average, of tokens that all experts know."""
    of_size, of_distance = TOLERANCE.get(mixed.dtype, TOLERANCE[torch.bfloat16])
    mixed, dense, average = mixed.float(), dense.float(), average.float()
    distance = float((dense - average).norm())
    error = float((mixed - dense).norm())
    allowed = max(of_size * float(dense.norm()), of_distance * distance)
    if not error <= allowed:  # NaN is no match either
        raise ModelError(
            f"expert {expert!r} does not answer as its reconstruction does (logits off by {error:.3g}, {allowed:.3g} "
            "allowed); the server does not start: run `polymerge verify` on the bundle"
        )
    if distance and torch.equal(mixed, average):
        raise ModelError(f"expert {expert!r} answers as the average does: its adapter is ignored; the server stops")
    if not distance:
        logger.warning("expert %s is the average itself on the probe prompt", expert)


@torch.inference_mode()
def _mixed(engine: HFEngine, ids: list[int], expert: str | None) -> Tensor:
    with engine.assigned([expert], 1):
        logits: Tensor = engine.hf(input_ids=torch.tensor([ids], device=engine.device), use_cache=False).logits[0]
    return logits.cpu()


@torch.inference_mode()
def _dense(engine: HFEngine, bundle: Bundle, ids: list[int], expert: str) -> Tensor:
    """By transformers' own modules, whose parameters are the reconstructed ones."""
    from transformers import AutoConfig

    dtype = engine.hf.dtype
    tensors = dense_state(bundle, expert, dtype)
    config = AutoConfig.from_pretrained(bundle.persona(expert).config_folder, local_files_only=True)
    config.get_text_config().vocab_size = engine.model.vocabularies.of(expert)
    model: Any = type(engine.hf).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    del tensors
    logits: Tensor = model.eval().to(engine.device)(input_ids=torch.tensor([ids], device=engine.device)).logits[0]
    return logits.cpu()
