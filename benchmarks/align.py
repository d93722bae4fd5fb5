"""What `align: permutation` gives for two small models that were trained apart, on the same text.

Two tiny Llamas learn the bytes of a text, from two random beginnings. Three pairs:

    shuffled     the first, and itself with neurons and heads in another order
    one basis    trained apart; both began with the same embeddings, norms and head, and everything between at random
    apart        trained apart from beginnings that have nothing in common

Each is merged with and without `align` at the rates given, and the second expert is held against its original on text
that was held out: KL(original || expert) in nats a byte, the energy that its residuals keep, how far it is from the
first. The hidden dimension stays as it is in both, which is why the last pair gains little.

    python benchmarks/align.py            # two and a half minutes of one core; writes benchmark-align.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from polymerge import inspect_bundle, load_model, merge
from polymerge.merging.align import axes_of_checkpoint, random_orders
from polymerge.sources.aligned import AlignedCheckpoint, moves_of
from polymerge.sources.dense import dense_model
from polymerge.sources.opening import open_checkpoint

CONFIG = transformers.LlamaConfig(
    vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
BATCH, LENGTH, HELD_OUT = 16, 96, 32
BASIS = ("embed_tokens", "lm_head", "norm")


def text_of(folder: Path) -> torch.Tensor:
    """The bytes of the pages in a folder, one after the other."""
    data = b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.md")))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def windows(data: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pieces of the text, [count, LENGTH]."""
    starts = torch.randint(len(data) - LENGTH, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(LENGTH)]


def trained(data: torch.Tensor, seed: int, steps: int, basis: Any, target: Path) -> Any:
    """A model that has learned the text, saved; with the embeddings, norms and head of `basis` where that is given."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(CONFIG)
    if basis is not None:
        shared = {n: t for n, t in basis.items() if any(part in n for part in BASIS)}
        model.load_state_dict(shared, strict=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = windows(data, BATCH, generator)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval().save_pretrained(target)
    return model


def shuffled(source: Path, target: Path) -> None:
    """The model with neurons and heads in another order."""
    checkpoint = open_checkpoint(str(source))
    axes = axes_of_checkpoint(checkpoint)
    orders = random_orders(axes, torch.Generator().manual_seed(0))
    dense_model(AlignedCheckpoint(checkpoint, moves_of(axes, orders)), dtype=torch.float32).save_pretrained(target)


def measured(pair: dict[str, Path], rate: float, align: bool, held_out: torch.Tensor, folder: Path) -> dict[str, Any]:
    """One merge of a pair."""
    recipe: dict[str, Any] = {"experts": {n: str(p) for n, p in pair.items()}, "compress_rate": rate, "code": "factors"}
    bundle = merge(recipe | ({"align": "permutation"} if align else {}), folder, overwrite=True)
    inspection = inspect_bundle(bundle).experts[1]
    model = load_model(bundle, device="cpu", dtype="float32")
    original = transformers.LlamaForCausalLM.from_pretrained(pair["second"]).eval()
    with torch.no_grad():
        wanted = torch.log_softmax(original(input_ids=held_out).logits.double(), -1)
        got = torch.log_softmax(model(input_ids=held_out, experts="second").logits.double(), -1)
    return {
        "rate": rate,
        "align": align,
        "kl": float((wanted.exp() * (wanted - got)).sum(-1).mean()),
        "energy_kept": inspection.energy_kept,
        "relative_error": inspection.relative_error,
        "distance": list(inspection.aligned) if inspection.aligned else None,
    }


def pairs_of(data: torch.Tensor, steps: int, folder: Path) -> dict[str, dict[str, Path]]:
    """The experts of the three pairs, made."""
    first = trained(data, 1, steps, None, folder / "first")
    torch.manual_seed(1)
    beginning = transformers.LlamaForCausalLM(CONFIG).state_dict()
    trained(data, 2, steps, beginning, folder / "one basis")
    trained(data, 3, steps, None, folder / "apart")
    del first
    shuffled(folder / "first", folder / "shuffled")
    return {name: {"first": folder / "first", "second": folder / name} for name in ("shuffled", "one basis", "apart")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of .md files")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.95, 0.8])
    parser.add_argument("--output", type=Path, default=Path("benchmark-align.json"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    began = time.perf_counter()
    data = text_of(arguments.text)
    split = len(data) * 9 // 10
    held_out = windows(data[split:], HELD_OUT, torch.Generator().manual_seed(9))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, pair in pairs_of(data[:split], arguments.steps, Path(place)).items():
            for rate in arguments.rates:
                for align in (False, True):
                    row = measured(pair, rate, align, held_out, Path(place) / "bundle")
                    rows.append({"pair": name, **row})
    table = Table("pair", "rate", "align", "KL, nats a byte", "energy kept", "relative error", "distance before, after")
    for row in rows:
        distance = "{:.3f}, {:.3f}".format(*row["distance"]) if row["distance"] else ""
        table.add_row(
            row["pair"], f"{row['rate']:g}", "yes" if row["align"] else "no", f"{row['kl']:.4f}",
            f"{row['energy_kept']:.1%}", f"{row['relative_error']:.3f}", distance,
        )  # fmt: skip
    Console(width=120).print(table)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s; text {len(data)} bytes, {arguments.steps} steps")
    arguments.output.write_text(
        json.dumps({"seconds": seconds, "steps": arguments.steps, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
