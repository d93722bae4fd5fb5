"""A bundle whose base is in fewer bits: bytes on disk and in memory, and how far every expert is from its original.

    python benchmarks/quantised.py --bundle BUNDLE                    # its experts' sources must still be there
    python benchmarks/quantised.py --bundle BUNDLE --gguf             # and llama.cpp's q8_0 (extra llamacpp)
    python benchmarks/quantised.py --bundle BUNDLE --bases --hold int8 nf4      # quantised when it is loaded, no more

Held-out requests are the demo's, or `--data FOLDER` with NAME/test.jsonl for every expert; GPTQ is calibrated with
every second one of `--calibrate` training rows (NAME/train.jsonl), which are none of these. Every original is run by
transformers; compared are the tokens of answers. Bytes are in units of one 16-bit model. In a GGUF llama.cpp itself is
asked, over fewer tokens, so its 16-bit line is measured on the same ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from peer_methods.sizes import held_bytes
from polymerge import Bundle, export_gguf, load_model, quantize_bundle
from polymerge.cli.logs import hush_libraries
from polymerge.demo.run import DemoSettings, load_skills
from polymerge.export.gguf.measure import measure_served
from polymerge.export.packing import BASE_WAYS
from polymerge.model.quantised import Base
from polymerge.search.agreement import Reference
from polymerge.search.examples import Example, read_examples


@dataclass(frozen=True)
class Line:
    """One way to hold the bundle. Bytes in units of one 16-bit model; KL in nats a token, over all experts' tokens."""

    name: str
    disk: float
    resident: float | None
    experts: Mapping[str, float]

    @property
    def kl(self) -> float:
        return sum(self.experts.values()) / len(self.experts)


def examples_of(bundle: Bundle, data: Path | None, split: str, limit: int) -> dict[str, Sequence[Example]]:
    """Of the split `train` or `test`."""
    if data is not None:
        return {name: read_examples(data / name / f"{split}.jsonl", limit) for name in bundle.experts}
    skills = {skill.name: skill for skill in load_skills(DemoSettings(output=Path()))}
    rows = {name: getattr(skills[name], split)[:limit] for name in bundle.experts}
    return {name: [Example(e.prompt, e.answer) for e in of_skill] for name, of_skill in rows.items()}


def line_of(name: str, bundle: Bundle, references: Mapping[str, Reference], one: int, base: str) -> Line:
    model = load_model(bundle, base=base)
    resident = held_bytes(model)
    kl = {
        expert: reference.against(lambda ids, expert=expert: model(ids, experts=expert).logits, model.device).kl  # type: ignore[misc]
        for expert, reference in references.items()
    }
    return Line(name, bundle.sizes().total / one, resident / one, kl)


class Originals:
    """What the originals say to the held-out requests, in the form that llama.cpp is held against."""

    def __init__(self, bundle: Bundle, examples: Mapping[str, Sequence[Example]]) -> None:
        self.bundle, self.examples = bundle, examples
        self._rows: dict[str, list[tuple[list[int], int, torch.Tensor]]] = {}

    def truths(self, expert: str) -> Iterator[tuple[list[int], int, torch.Tensor]]:
        if expert not in self._rows:
            self._rows[expert] = list(self._read(expert))
        yield from self._rows[expert]

    def _read(self, expert: str) -> Iterator[tuple[list[int], int, torch.Tensor]]:
        from polymerge.engine.local.engine import HFEngine

        engine = HFEngine.from_checkpoint(self.bundle.manifest.experts[expert].source)
        for example in self.examples[expert]:
            prompt = engine.chat_prompt([{"role": "user", "content": example.prompt}])
            ids = [*prompt, *engine.encode(example.answer, special=False)]
            with torch.no_grad():
                logits = engine.model(torch.tensor([ids])).logits[0, :-1]
            yield ids, len(prompt), logits.float().log_softmax(-1)


def gguf_lines(bundle: Bundle, examples: Mapping[str, Sequence[Example]], one: int, folder: Path) -> Iterator[Line]:
    originals: Any = Originals(bundle, examples)
    for kind in ("f16", "q8_0"):
        made = export_gguf(bundle.path, folder / kind, type=kind, lossy=True)
        served = measure_served(made.folder, made.note, originals)
        disk = sum(file.stat().st_size for file in made.folder.rglob("*.gguf"))
        yield Line(f"GGUF, {kind}", disk / one, None, {name: entry.kl for name, entry in served.items()})


def show(lines: Sequence[Line], console: Console) -> None:
    table = Table("base", "disk", "resident", *(f"KL {name}" for name in lines[0].experts), "KL", "of 16 bits'")
    first: dict[bool, Line] = {}
    for line in lines:
        reference = first.setdefault(line.resident is None, line)
        resident = "" if line.resident is None else f"{line.resident:.3f}"
        kl = [f"{value:.3g}" for value in line.experts.values()]
        table.add_row(line.name, f"{line.disk:.3f}", resident, *kl, f"{line.kl:.3g}", f"{line.kl / reference.kl:.2f}")
    console.print(table)


def main() -> None:
    """Prints one table and, where asked, writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="with NAME/test.jsonl for every expert")
    parser.add_argument("--limit", type=int, default=24, help="held-out requests of each expert")
    parser.add_argument("--bases", nargs="*", choices=list(BASE_WAYS), default=list(BASE_WAYS), help="that are stored")
    parser.add_argument("--hold", nargs="*", default=[], choices=get_args(Base), help="quantised when it is loaded")
    parser.add_argument("--calibrate", type=int, default=128, help="training requests of each expert for GPTQ")
    parser.add_argument("--gguf", action="store_true", help="llama.cpp's f16 and q8_0 too")
    parser.add_argument("--no-int8", action="store_true", help="not the base in 8 bits in memory, which needs torchao")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    hush_libraries()
    bundle = Bundle.open(options.bundle)
    examples, one = examples_of(bundle, options.data, "test", options.limit), bundle.sizes().one_model
    training = examples_of(bundle, options.data, "train", options.calibrate)
    sources = {name: record.source for name, record in bundle.manifest.experts.items()}
    references = {name: Reference(source, examples[name]) for name, source in sources.items()}
    with tempfile.TemporaryDirectory() as folder:
        lines = [line_of(f"{bundle.manifest.dtype}", bundle, references, one, "16bit")]
        lines += [line_of(f"{base}, held", bundle, references, one, base) for base in options.hold]
        for base in options.bases:
            small = quantize_bundle(bundle, Path(folder) / base, base=base, prompts=training).bundle
            lines.append(line_of(f"{base}, stored", small, references, one, "16bit"))
            if small.manifest.base_code == "int8" and not options.no_int8:
                lines.append(line_of(f"{base}, stored and held", small, references, one, "int8"))
        if options.gguf:
            lines += gguf_lines(bundle, examples, one, Path(folder))
    show(lines, Console(width=140))
    if options.json:
        figures = [asdict(line) | {"kl": line.kl} for line in lines]
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
