"""Which rows may go through a model together so that each says what it says alone: tried on the model itself.

Attention does not look at what its mask leaves out. A recurrent state takes in all that goes by, and some architectures
have no mask for it (RWKV, xLSTM, MiniMax, RecurrentGemma); some count positions from the first column, padding or not
(Bart's decoder). Their rows must be of one length. RWKV mixes the states of rows even so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from .cache import joins
from .fixed import without_settings
from .loaded import LoadedModel

# Rows of any length, padded on the left; rows of one length; one row.
Together = Literal["padded", "alike", "alone"]
# Tokens of a tried row, of what is beside it, and that are made after it.
TOKENS, LONGER, MADE = 5, 8, 3
# A difference is larger than this share of the logits' norm.
DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@torch.inference_mode()
def rows_together(model: LoadedModel) -> Together:
    """What changes nothing of the average's answer. A model that is told where tokens stand and keeps nothing but keys
    and values is not tried."""
    if joins(model.hf) or not model.hf.can_generate():
        return "padded"
    words = int(model.hf.config.get_text_config().vocab_size)
    row, beside = ([(7 * n + words // part) % words for n in range(LONGER)] for part in (2, 3))
    alone = _said(model, [row[:TOKENS]])
    near = DIFFERENCE.get(model.hf.dtype, 1e-3) * float(torch.linalg.vector_norm(alone))

    def same(other: list[int]) -> bool:
        return float(torch.linalg.vector_norm(_said(model, [row[:TOKENS], other]) - alone)) < near

    return "alone" if not same(beside[:TOKENS]) else "alike" if not same(beside) else "padded"


def _said(model: LoadedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits before every token that is made after the first row. [MADE, V]"""
    ids, mask = model.padded(rows)
    pad = int(model.tokenizer.pad_token_id)
    settings = GenerationConfig(
        max_new_tokens=MADE, do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    with model.assigned(None, len(rows)), without_settings(model.hf, pad):
        logits = model.hf.generate(ids, attention_mask=mask, generation_config=settings).logits
    return torch.stack([step[0].float() for step in logits])
