"""What llama.cpp answers of an exported folder, against the bundle's own experts.

llama.cpp tells the likeliest tokens of a place, so the divergence is taken over these and all others as one: by the
data-processing inequality it is at most the true one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ...engine.llamacpp.api import LlamaApi
from ...engine.llamacpp.folder import GgufNote, Kind, Served
from ...engine.llamacpp.lora import applied_adapter
from ...engine.llamacpp.server import llama_server
from ...errors import ModelError
from ..vllm.calibrate import Calibration

# Of a place; the others of the demo's vocabulary have some thousandths together.
LIKELIEST = 256
# KL that llama.cpp may add to what torch measures. Rounding took less than 0.0005 at f16 and 0.006 at q8_0 on the
# demo's experts (docs/laptop.md); torch may round too, to bfloat16 on a GPU.
LARGEST_MORE: dict[Kind, float] = {"f32": 0.01, "bf16": 0.01, "f16": 0.01, "q8_0": 0.05, "q4_k_m": 0.5}
# So many tokens an expert: each is a call.
MOST_TOKENS = 64


def measure_served(folder: Path, note: GgufNote, calibration: Calibration) -> dict[str, Served]:
    """Runs llama.cpp on a written folder. Raises ModelError: it cannot load it."""
    context = max(len(ids) for expert in note.experts for ids, _ in calibration.rows(expert)) + 8
    with llama_server(folder, note=note, rows=1, cache_tokens=max(context, 256)) as api:
        return {e: _served(api, note, e, calibration.truths(e)) for e in note.experts}


def check_served(note: GgufNote) -> None:
    """Raises ModelError where llama.cpp answers otherwise than the exported expert does in torch by more than rounding:
    it runs another forward pass. Where the caller took losses, these may be of the forward pass."""
    for name, expert in note.experts.items():
        more = expert.served.kl - expert.kl if expert.served else 0.0
        if more > LARGEST_MORE[note.type] and not note.lost:
            raise ModelError(
                f"expert {name!r}: llama.cpp is {more:.2g} nats a token (KL) from the exported expert, more than "
                f"{note.type} rounds: it does not run this architecture as transformers does; export with --to dense"
            )


def _served(api: LlamaApi, note: GgufNote, expert: str, rows: Iterable[tuple[list[int], int, Tensor]]) -> Served:
    lora, total, same, tokens = applied_adapter(list(note.experts), expert), 0.0, 0, 0
    for ids, start, truth in rows:
        for place, of_place in enumerate(truth, max(start, 1)):
            if tokens == MOST_TOKENS:
                break
            told = api.next_scores(ids[:place], lora, count=LIKELIEST)["top_logprobs"]
            likeliest = torch.tensor([entry["id"] for entry in told])
            total += divergence(of_place, likeliest, torch.tensor([entry["logprob"] for entry in told]))
            same += int(of_place.argmax() == likeliest[0])
            tokens += 1
    return Served(kl=max(total, 0.0) / max(tokens, 1), same_token=same / max(tokens, 1), tokens=tokens)


def divergence(truth: Tensor, tokens: Tensor, logprobs: Tensor) -> float:
    """KL(p || q) in nats, with all but some tokens taken as one.

    Args:
        truth: log p of all tokens, [V].
        tokens, logprobs: the tokens that q tells, and their log q. [K]
    """
    log_p, log_q = truth.double()[tokens], logprobs.double()
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = (max(1.0 - float(part.sum()), 1e-12) for part in (p, q))
    rest = rest_p * float(torch.log(torch.tensor(rest_p / rest_q, dtype=torch.float64)))
    return float((p * (log_p - log_q)).sum()) + rest
