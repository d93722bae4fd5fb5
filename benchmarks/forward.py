"""Tokens a second of one batch that mixes three experts: ours against other ways to serve the same rows.

    dense base        the average alone, every row: what the mixture costs is measured against it
    polymerge         every row its own expert, one model
    PEFT              the same adapters in one model, `adapter_names` for the rows
    three models      the dense experts one after the other, each with its third of the batch
    int4              a bundle of the code int4 at the same rate, whose factors are decoded when it is loaded
    int4, packed      the same with `residuals="packed"`, decoded whenever a layer is run

The bundle is SmolLM2-135M with three experts, merged at 0.95 with `scale: shared` and everything else averaged, because
that is all that PEFT can hold. All systems run interleaved in one process, and their logits are compared first: a fast
wrong answer is not a result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from chosen import demo_base, demo_experts
from polymerge import export_dense, load_model, merge
from polymerge.host import cache_folder

OURS = "polymerge"
BASE = "dense base"
# logits(ids, cache or None) -> (logits, cache); a cache continues where a prompt ended
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


def bundle_folder(*, codes_only: bool) -> Path:
    """The benchmark's bundles, made from the demo's experts (trained where the cache lacks them)."""
    _, experts = demo_experts(demo_base())
    recipe = {"experts": experts, "code": "factors", "scale": "shared", "embeddings": "average", "norms": "average"}
    folder = cache_folder() / "bench-forward"
    merge(recipe, folder / "bundle", overwrite=True)
    merge(recipe | {"code": "int4"}, folder / "int4", overwrite=True)
    for name in () if codes_only else experts:
        export_dense(folder / "bundle", name, folder / name, overwrite=True)
    return folder


def systems(folder: Path, batch: int) -> dict[str, Step]:
    """Every system as one function over a batch whose rows take the experts in turn."""
    from peft import PeftModel

    steps = ours(folder, batch)
    names = list(json.loads((folder / "bundle/polymerge.json").read_text())["experts"])
    rows = [names[number % len(names)] for number in range(batch)]
    adapted = PeftModel.from_pretrained(_open(folder / "bundle"), folder / "bundle/experts" / names[0], names[0])
    for name in names[1:]:
        adapted.load_adapter(folder / "bundle/experts" / name, name)
    adapted.eval()
    dense = [(_open(folder / name), list(range(number, batch, len(names)))) for number, name in enumerate(names)]

    def one_after_the_other(ids: Tensor, caches: Any) -> tuple[Tensor, Any]:
        kept, all_logits = [], None
        for number, (expert, own_rows) in enumerate(dense):
            logits, cache = _call(expert)(ids[own_rows], caches[number] if caches else None)
            all_logits = logits.new_empty(len(ids), *logits.shape[1:]) if all_logits is None else all_logits
            all_logits[own_rows] = logits
            kept.append(cache)
        assert all_logits is not None
        return all_logits, kept

    return steps | {"PEFT": _call(adapted, adapter_names=rows), "three models": one_after_the_other}


def ours(folder: Path, batch: int) -> dict[str, Step]:
    """The average alone, and the codes."""
    model = load_model(folder / "bundle")
    rows = [model.experts[number % len(model.experts)] for number in range(batch)]
    return {
        BASE: _call(_open(folder / "bundle")),
        OURS: _call(model, experts=rows),
        "int4": _call(load_model(folder / "int4"), experts=rows),
        "int4, packed": _call(load_model(folder / "int4", residuals="packed"), experts=rows),
    }


def _open(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _call(model: Any, **options: Any) -> Step:
    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(ids, past_key_values=cache, use_cache=True, **options)
        return output.logits, output.past_key_values

    return step


def largest_difference(steps: dict[str, Step], ids: Tensor) -> float:
    """Largest difference of any mixed system's logits from the dense experts'. Raises SystemExit where it is not
    rounding."""
    expected, _ = steps["three models"](ids, None)
    worst = max(float((steps[name](ids, None)[0] - expected).abs().max()) for name in (OURS, "PEFT"))
    if worst > 1e-2:
        raise SystemExit(f"the systems answer differently: logits differ by {worst:.3g}")
    return worst


def measure(
    steps: dict[str, Step], ids: Tensor, new_tokens: int, repeats: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Median seconds of a prefill of `ids` and of decoding `new_tokens` after it. The systems take turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = clock()
            _, cache = step(ids, None)
            middle = clock()
            for _ in range(new_tokens):
                _, cache = step(ids[:, :1], cache)
            ended = clock()
            if repeat:  # the first round warms up
                seconds[name]["prefill"].append(middle - began)
                seconds[name]["decode"].append(ended - middle)
    return {name: {kind: statistics.median(s) for kind, s in kinds.items()} for name, kinds in seconds.items()}


def run(
    batches: Sequence[int],
    prompt: int,
    new_tokens: int,
    repeats: int,
    *,
    codes_only: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """All batch sizes; plain data for the table and the file."""
    folder = bundle_folder(codes_only=codes_only)
    results = []
    for batch in track(batches, description="measuring", transient=True):
        generator = torch.Generator().manual_seed(batch)
        ids = torch.randint(100, 40_000, (batch, prompt), generator=generator)
        with torch.no_grad():
            steps = ours(folder, batch) if codes_only else systems(folder, batch)
            worst = 0.0 if codes_only else largest_difference(steps, ids)
            seconds = measure(steps, ids, new_tokens, repeats, clock)
        tokens = {"prefill": batch * prompt, "decode": batch * new_tokens}
        for kind in ("prefill", "decode"):
            for name, taken in seconds.items():
                results.append(
                    {
                        "batch": batch,
                        "phase": kind,
                        "system": name,
                        "seconds": taken[kind],
                        "tokens_per_second": tokens[kind] / taken[kind],
                        "times_dense_base": taken[kind] / seconds[BASE][kind],
                        "largest_difference": worst,
                    }
                )
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    settings = {"prompt": prompt, "new_tokens": new_tokens, "repeats": repeats}
    return {"cores": os.cpu_count(), "versions": packages, "settings": settings, "results": results}


def table(report: dict[str, Any]) -> Table:
    """One line a batch size and phase, one column a system: tokens a second (times the dense base's time)."""
    lines = report["results"]
    names = list(dict.fromkeys(line["system"] for line in lines))
    worst = max(line["largest_difference"] for line in lines)
    title = f"tokens a second (times the dense base's time); logits agree to {worst:.1e}"
    shown = Table("batch", "phase", *names, title=title)
    for batch, kind in dict.fromkeys((line["batch"], line["phase"]) for line in lines):
        by_system = {line["system"]: line for line in lines if (line["batch"], line["phase"]) == (batch, kind)}
        cells = [
            f"{by_system[name]['tokens_per_second']:.0f} ({by_system[name]['times_dense_base']:.2f})" for name in names
        ]
        shown.add_row(str(batch), kind, *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[3, 6, 12, 24])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--codes-only", action="store_true", help="leave out PEFT and the dense models")
    parser.add_argument("--processor", action="store_true", help="count its seconds, where others use the machine too")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/forward.json"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = run(
        options.batches,
        options.prompt,
        options.new_tokens,
        options.repeats,
        codes_only=options.codes_only,
        clock=time.process_time if options.processor else time.perf_counter,
    )
    Console(width=120).print(table(report))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
