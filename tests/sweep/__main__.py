"""`python -m tests.sweep`: every causal language model of the installed transformers, and docs/architectures.md.

With names of architectures only those, and nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .check import check

VARIANTS = os.environ.get("VARIANTS", "0 0.95 int4 bfloat16").split()
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes = []
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        began = time.perf_counter()
        outcomes.append(check(name, variants=VARIANTS))
        line = asdict(outcomes[-1]) | {"seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(line), flush=True)


main(sys.argv[1:])
