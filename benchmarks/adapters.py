"""Adapters over one model as a bundle, beside the model and the adapters apart: bytes, and logits against PEFT's.

    python benchmarks/adapters.py

Three adapters of rank 8 on all linear layers of SmolLM2-135M, each trained for eight steps on random tokens (what they
learn does not matter here), merged in both ways that a recipe has for adapters. About five minutes of one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from chosen import demo_base
from polymerge import Bundle, load_model, merge
from polymerge.bundle.stats import energy_kept

NAMES, RANK, STEPS = ("a", "b", "c"), 8, 8


def main() -> None:
    """Prints one line for the parts, and one for each way."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        folder, base = Path(scratch), demo_base()
        expected = {name: trained(number, base, folder / name) for number, name in enumerate(NAMES)}
        apart = sum(size_of(place) for place in (base, *(folder / name for name in NAMES)))
        print(f"model and adapters apart: {apart / 1e6:.2f} MB of weights")
        for way in ("exact", "average"):
            sources = {name: {"source": str(folder / name), "base": str(base)} for name in NAMES}
            bundle = merge({"experts": sources, "method": "published", "adapters": way}, folder / way)
            off = max(distances(bundle, expected))
            print(
                f"adapters: {way}: {bundle.sizes().total / 1e6:.2f} MB, logits {off:.1e} from PEFT's (relative), "
                f"{energy_kept(bundle.stats()):.1%} of the energy kept"
            )


def trained(number: int, base: Path, folder: Path) -> Tensor:
    """Writes an adapter, and gives PEFT's logits of it."""
    import peft

    torch.manual_seed(number)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(STEPS):
        ids = torch.randint(10, 40_000, (1, 48))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return logits(model.eval())


@torch.no_grad()
def logits(model: Any, **more: Any) -> Tensor:
    """Of two rows of random tokens."""
    ids = torch.randint(10, 40_000, (2, 16), generator=torch.Generator().manual_seed(0))
    result: Tensor = model(ids, **more).logits
    return result


def distances(bundle: Bundle, expected: dict[str, Tensor]) -> Iterator[float]:
    """How far every expert's logits are from PEFT's, alone and in a mixed batch."""
    model = load_model(bundle, device="cpu")
    mixed = logits(model, experts=list(NAMES[:2]))
    for row, name in enumerate(NAMES):
        theirs = expected[name]
        yield float((logits(model, experts=name) - theirs).norm() / theirs.norm())
        if row < len(mixed):
            yield float((mixed[row] - theirs[row]).norm() / theirs[row].norm())


def size_of(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
