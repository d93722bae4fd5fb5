"""Codes of residuals at equal bytes: what each keeps of the experts, on held-out prompts.

    python benchmarks/codes.py                                                 # the demo's three experts
    python benchmarks/codes.py --bundle BUNDLE --data ../shared/data           # the sources of a bundle
    python benchmarks/codes.py --experts NAME=FOLDER ... --data ../shared/data # any experts

Beside polymerge's codes: int4 at half the bytes, the published factors rounded to 16 bits, the average, and BitDelta
(Liu et al. 2024, arXiv 2402.10193: the sign of the residual and one scale a matrix, here around the average and without
its training of the scales). int4 is also run as others would run it: decoded and exported, by PEFT itself, and
with the adapters that are written for vLLM, added as vLLM adds them. Every original is run by transformers itself.
Embeddings, norms and biases are each expert's own but for the plain average.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from chosen import add_arguments, demo_base, demo_experts, named_sources
from peer_methods import bitdelta
from polymerge import Bundle, load_model, merge
from polymerge.bundle.adapter import adapter_of
from polymerge.bundle.inspect import inspect_bundle
from polymerge.bundle.layer import BundleLayer
from polymerge.bundle.manifest import ADAPTER_FILE
from polymerge.cli.logs import hush_libraries
from polymerge.engine.local.engine import HFEngine
from polymerge.export import export_peft, plan_vllm, write_vllm
from polymerge.export.vllm.calibrate import applied, read_adapter
from polymerge.method.codes import CODES, PLAIN
from polymerge.search.agreement import Agreement, Reference
from polymerge.search.examples import Example, read_examples

# rebuild(expert, layer, the original's matrix, rho times the average) -> the method's matrix, and its bytes
Rebuild = Callable[[str, BundleLayer, Tensor, Tensor], tuple[Tensor, int]]


def signs_around_average(expert: str, layer: BundleLayer, weight: Tensor, base: Tensor) -> tuple[Tensor, int]:
    signs, scale = bitdelta.encode(weight - base)
    return base + bitdelta.decode(signs, scale, weight.shape[1]), signs.nbytes + scale.nbytes


def rounded_factors(bundle: Bundle) -> Rebuild:
    """The published code in 16 bits, whatever the bundle's dtype."""
    adapters = {expert: adapter_of(bundle, expert) for expert in bundle.experts}

    def rebuild(expert: str, layer: BundleLayer, weight: Tensor, base: Tensor) -> tuple[Tensor, int]:
        a, b = (adapters[expert][f"{layer.module}.lora_{factor}.weight"].bfloat16() for factor in "AB")
        return base + b.float() @ a.float(), a.nbytes + b.nbytes

    return rebuild


class CodeRow:
    """One method's line."""

    def __init__(
        self, name: str, agreements: Mapping[str, Agreement], residual_bytes: int, seconds: float | None
    ) -> None:
        self.name, self.agreements, self.bytes, self.seconds = name, agreements, residual_bytes, seconds

    @property
    def kl(self) -> float:
        return sum(agreement.kl for agreement in self.agreements.values()) / len(self.agreements)

    @property
    def top1(self) -> float:
        return sum(agreement.top1 for agreement in self.agreements.values()) / len(self.agreements)


def merged(
    code: str, sources: Mapping[str, str], references: Mapping[str, Reference], rate: float, to: Path, name: str = ""
) -> CodeRow:
    began = time.perf_counter()
    tables = {"embeddings": "keep", "lm_head": "keep"}
    bundle = merge({"experts": sources, "compress_rate": rate, "code": code, **tables}, to)
    seconds = time.perf_counter() - began
    model = load_model(bundle)
    agreements = {
        name: reference.against(lambda ids, name=name: model(ids, experts=name).logits)  # type: ignore[misc]
        for name, reference in references.items()
    }
    return CodeRow(
        name or code, agreements, sum(expert.residual_bytes for expert in inspect_bundle(bundle).experts), seconds
    )


def rebuilt(name: str, rebuild: Rebuild, bundle: Bundle, references: Mapping[str, Reference]) -> CodeRow:
    """The originals with every compressed matrix replaced by what a method makes of it."""
    agreements, total = {}, 0
    for expert, reference in references.items():
        model = HFEngine.from_checkpoint(bundle.manifest.experts[expert].source).model
        parameters, scales = dict(model.named_parameters()), bundle.scales(expert)
        for layer in (layer for layer in bundle.layers.values() if layer.role == "linear" and layer.rank):
            weight = parameters[f"{layer.module}.{layer.parameter}"].data
            base = bundle.base_tensor(layer.tensor).float() * scales[layer.tensor]
            new, size = rebuild(expert, layer, weight, base)
            weight.copy_(new)
            total += size
        agreements[expert] = reference.against(lambda ids, model=model: model(ids).logits)  # type: ignore[misc]
    return CodeRow(name, agreements, total, None)


def by_peft(bundle: Bundle, references: Mapping[str, Reference], folder: Path) -> CodeRow:
    """Every expert exported for PEFT, on the average as transformers loads it."""
    from peft import PeftModel

    agreements, total = {}, 0
    for expert, reference in references.items():
        made = export_peft(bundle, expert, folder / expert)
        total += sum(a.nbytes + b.nbytes for a, b in read_adapter(load_file(made.folder / ADAPTER_FILE)).values())
        model = PeftModel.from_pretrained(HFEngine.from_checkpoint(str(bundle.path)).model, made.folder).eval()
        agreements[expert] = reference.against(lambda ids, model=model: model(ids).logits)  # type: ignore[misc]
    return CodeRow(f"{bundle.code.name}, exported, by PEFT", agreements, total, None)


def by_vllm_adapters(bundle: Bundle, references: Mapping[str, Reference], folder: Path) -> CodeRow:
    """The export to vLLM, its adapters added to the average's layers and nothing else."""
    write_vllm(plan_vllm(bundle), folder, device="cpu")
    model, agreements, total = HFEngine.from_checkpoint(str(folder)).model, {}, 0
    for expert, reference in references.items():
        adapter = read_adapter(load_file(folder / "adapters" / expert / ADAPTER_FILE))
        total += sum(a.nbytes + b.nbytes for a, b in adapter.values())
        with applied(model, adapter):
            agreements[expert] = reference.against(lambda ids: model(ids).logits)
    return CodeRow(f"{bundle.code.name}, exported, vLLM's adapters", agreements, total, None)


def averaged(bundle: Bundle, references: Mapping[str, Reference]) -> CodeRow:
    model = load_model(bundle)
    agreements = {name: reference.against(lambda ids: model(ids).logits) for name, reference in references.items()}
    return CodeRow("plain average", agreements, 0, None)


def chosen_experts(arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, list[Example]]]:
    """Expert -> its source, and its held-out requests."""
    limit, sources = arguments.limit, named_sources(arguments)
    if sources:
        return sources, {name: read_examples(arguments.data / name / "test.jsonl", limit) for name in sources}
    skills, sources = demo_experts(demo_base())
    return sources, {s.name: [Example(e.prompt, e.answer) for e in s.test[:limit]] for s in skills}


def installed(code: str) -> bool:
    return code in PLAIN or find_spec("constriction") is not None


def measured(
    sources: Mapping[str, str], references: Mapping[str, Reference], rate: float, folder: Path
) -> tuple[list[CodeRow], int]:
    """All rows, and how many numbers the compressed matrices of all experts have."""
    rows = [merged(code, sources, references, rate, folder / code) for code in CODES if installed(code)]
    last = PLAIN[-1]
    rows.append(merged(last, sources, references, (1 + rate) / 2, folder / "half", f"{last}, half the bytes"))
    rows.append(by_peft(Bundle.open(folder / last), references, folder / "peft"))
    rows.append(by_vllm_adapters(Bundle.open(folder / last), references, folder / "vllm"))
    bundle = Bundle.open(folder / "factors")
    rows.append(rebuilt("factors in 16 bits", rounded_factors(bundle), bundle, references))
    rows.append(rebuilt("BitDelta around the average", signs_around_average, bundle, references))
    rows.append(averaged(bundle, references))
    linear = [layer for layer in bundle.layers.values() if layer.role == "linear" and layer.rank]
    return rows, len(sources) * sum(layer.shape[0] * layer.shape[1] for layer in linear)


def show(rows: list[CodeRow], numbers: int, console: Console) -> None:
    """Bytes as a share of the compressed matrices' own in 16 bits."""
    experts = list(rows[0].agreements)
    table = Table("method", "residuals", "share of 16 bit", *(f"KL {name}" for name in experts), "KL", "top-1", "merge")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes / 1e6:.1f} MB",
            f"{row.bytes / (2 * numbers):.2%}",
            *(f"{row.agreements[name].kl:.2g}" for name in experts),
            f"{row.kl:.2g}",
            f"{row.top1:.2%}",
            f"{row.seconds:.1f} s" if row.seconds else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", type=Path, help="with NAME/test.jsonl for every expert")
    parser.add_argument("--rate", type=float, default=0.95)
    parser.add_argument("--limit", type=int, default=32, help="held-out prompts of each expert")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    hush_libraries()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
    sources, examples = chosen_experts(arguments)
    references = {name: Reference(source, examples[name]) for name, source in sources.items()}
    with tempfile.TemporaryDirectory() as folder:
        rows, numbers = measured(sources, references, arguments.rate, Path(folder))
    show(rows, numbers, Console(width=160))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.output:
        figures = {
            row.name: {
                "bytes": row.bytes,
                "kl": row.kl,
                "top1": row.top1,
                "seconds": row.seconds,
                "experts": {name: vars(agreement) for name, agreement in row.agreements.items()},
            }
            for row in rows
        }
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
