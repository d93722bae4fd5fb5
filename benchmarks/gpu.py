"""What a GPU makes of it, in one command, with torch, transformers, safetensors and triton alone and no network.

    PYTHONPATH=src python benchmarks/gpu.py --minutes 9 -o OUT           # Llama-3-8B's shapes, 3, 8 and 16 experts
    PYTHONPATH=src python benchmarks/gpu.py --small --minutes 1 -o OUT   # a small model: tries the script, on a CPU too

Weights are random and made on the device; only times, bytes and agreement mean something. Parts run in order, and what
each finds is written to OUT/gpu.json and OUT/gpu.txt at once, so that a run that is cut off still tells. A part that
fails says why, and the next one runs. On a card:

    kernel        the Triton kernel against the plain sum, for every code and shape
    logits        a mixed batch against dense models of each expert
    waits         whether a layer or a decoding step makes the host wait for the device
    decode        mixed steps against the average's, in tokens a second and in bytes moved a second
    graphs        the same with the step captured as a CUDA graph and replayed, against the average's captured step
    prefill       the same for prompts
    coded         the Triton kernel against decoded factors, one layer
    merge         one layer's average and factors, on the GPU and on the CPU
    base          the average's linear layers in int8 (torchao) and nf4 (bitsandbytes), where they are installed

Reach: a captured mixed step at 0.85 of the captured average's tokens a second, 32 rows. An expert's factors at a rate
of 0.95 are 5% of the linear layers' bytes, and a batch of all experts reads all of theirs: 16 read 1.7 times what
the average does, so that a step bound by memory alone could not be faster than 0.6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polymerge.method.codes import code_of
from polymerge.method.rsvd import rank_for_rate
from polymerge.model.assignment import Assignment
from polymerge.model.linear import MixedLinear
from polymerge.model.step import FixedStep, Row

RATE = 0.95
CODES = ("factors", "int8", "int4")
# Columns of keys and values that a captured step has room for beside the context.
ROOM = 64
# Modules of a decoder layer that read the same input.
INPUTS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


@dataclass(frozen=True)
class Size:
    """Of the model and of the batches."""

    hidden: int
    inner: int
    layers: int
    heads: int
    pairs: int
    vocabulary: int
    experts: tuple[int, ...]
    rows: int
    context: int
    prompt: int
    steps: int


LARGE = Size(4096, 14336, 32, 32, 8, 128256, (3, 8, 16), 32, 512, 512, 20)
SMALL = Size(64, 96, 2, 4, 2, 128, (3, 8), 8, 16, 16, 3)


@dataclass
class Report:
    """What was found so far, on the disk at every moment."""

    folder: Path
    end: float
    found: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def add(self, part: str, text: str, **figures: Any) -> None:
        self.found.setdefault(part, []).append(figures)
        self.lines.append(f"{part:<9}{text}")
        print(self.lines[-1], flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.folder / "gpu.txt").write_text("\n".join(self.lines) + "\n")

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of `repeats`, after two to warm up."""
    taken = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number > 1:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


class Mixed:
    """A Llama of random weights on the device, and the same with factors of every expert in its linear layers."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        _pack_queries()
        config = LlamaConfig(
            hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=layers or size.layers,
            num_attention_heads=size.heads, num_key_value_heads=size.pairs, vocab_size=size.vocabulary,
            max_position_embeddings=8192, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.hf: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        self.device, self.dtype, self.size = device, dtype, size
        self.linear = {n: m for n, m in self.hf.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        self.layers: dict[str, MixedLinear] = {}
        self.state = Assignment([], device)

    def with_experts(self, count: int) -> None:
        """Puts factors of so many experts into every linear layer."""
        self.plain()
        self.state = Assignment([f"e{n}" for n in range(count)], self.device)
        for number, (name, module) in enumerate(self.linear.items()):
            layer = self._mixed(module, count)
            layer.input_of = 4 * (number // len(INPUTS)) + INPUTS[name.rpartition(".")[2]]
            self.layers[name] = layer
            self._put(name, layer)

    def plain(self) -> None:
        """The average alone again."""
        for name, module in self.linear.items():
            self._put(name, module)
        self.layers = {}

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.hf.get_submodule(parent), leaf, module)

    def _mixed(self, module: nn.Linear, count: int) -> MixedLinear:
        out, inner = module.weight.shape
        rank = rank_for_rate(out, inner, RATE)

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=self.dtype) * scale

        factors = [
            (normal(rank, inner, scale=inner**-0.5), normal(out, rank, scale=0.02 * rank**-0.5)) for _ in range(count)
        ]
        ratios = [1 + 0.001 * (n + 1) for n in range(count)]
        return MixedLinear(self.state, module.weight.data, None, factors, ratios, [None] * count)

    def assign(self, rows: int) -> list[str]:
        names = [f"e{n % len(self.state.names)}" for n in range(rows)]
        self.state.set(names, rows)
        return names

    def prompt(self, rows: int, tokens: int) -> Tensor:
        made = torch.Generator().manual_seed(1)
        return torch.randint(0, self.size.vocabulary, (rows, tokens), generator=made).to(self.device)

    def weights(self) -> int:
        """Bytes that a step reads of weights and factors."""
        base = sum(m.weight.nbytes for m in self.linear.values()) + self.hf.lm_head.weight.nbytes
        factors = sum(b.nbytes for layer in self.layers.values() for b in (layer.stacked_a, layer.stacked_b))
        total: int = base + factors
        return total

    def cache(self, rows: int, tokens: int) -> int:
        config = self.hf.config
        head = config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * config.num_key_value_heads * head * self.dtype.itemsize
        total: int = rows * tokens * each
        return total

    def decoder(self, rows: int, context: int) -> Callable[[], Any]:
        """One step of a batch after a context; the cache is cut back after each."""
        past = self.hf(self.prompt(rows, context), use_cache=True, logits_to_keep=1).past_key_values
        token, place = self.prompt(rows, 1), torch.full((rows, 1), context, device=self.device)

        def step() -> None:
            self.hf(token, past_key_values=past, position_ids=place, use_cache=True)
            past.crop(-1)

        return step


def _pack_queries() -> None:
    """Older versions of transformers copy keys and values for every query head when they decode, which costs more than
    all else; newer ones bring the heads of one query together instead. So do we, for the average and the experts."""
    from transformers.integrations import sdpa_attention
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if hasattr(sdpa_attention, "pack_gqa"):
        return

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        rows, heads, tokens, width = query.shape
        if tokens > 1 or key.shape[1] == heads:
            return sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        packed = query.reshape(rows, key.shape[1], -1, width)
        output = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
        return output.reshape(rows, 1, heads, width), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend


def machine(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """What it is, and how fast its memory copies."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU: times mean nothing"
    block = torch.empty(2**28 if cuda else 2**22, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    rate = 2 * block.nbytes / seconds(lambda: other.copy_(block), device, 5)
    total = torch.cuda.mem_get_info(device)[1] if cuda else 0
    text = f"{name}, {total / 1e9:.0f} GB, copies {rate / 1e9:.0f} GB/s, torch {torch.__version__}, {dtype}"
    report.add("machine", text, name=name, bytes=total, copies=rate, torch=torch.__version__, dtype=str(dtype))


def kernel(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    from polymerge.model.triton.check import objection

    shapes = {(size.hidden, size.hidden), (size.inner, size.hidden), (size.hidden, size.inner)}
    for code in CODES:
        reason = objection(shapes, code_of(code, dtype), device, dtype)
        report.add("kernel", f"{code}: {reason or 'agrees with the plain sum'}", code=code, objection=reason)


def logits(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    model = Mixed(size, device, dtype, layers=min(2, size.layers))
    model.with_experts(size.experts[0])
    ids = model.prompt(len(model.state.names), 32)
    names = model.assign(len(ids))
    mixed, layers = model.hf(ids).logits.float(), dict(model.layers)
    model.plain()
    worst = 0.0
    for number, name in enumerate(names):
        kept = {n: m.weight.data for n, m in model.linear.items()}
        for module, layer in layers.items():
            model.linear[module].weight.data = layer.dense([float(e == name) for e in model.state.names] + [0.0])
        dense = model.hf(ids[number : number + 1]).logits.float()
        worst = max(worst, float((mixed[number] - dense[0]).norm() / dense.norm()))
        for module, weight in kept.items():
            model.linear[module].weight.data = weight
    report.add("logits", f"mixed rows are {worst:.2g} from dense experts (norm, relative)", worst=worst)


def waits(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        report.add("waits", "told by a GPU alone", tried=False)
        return
    model = Mixed(size, device, dtype, layers=2)
    for count in size.experts:
        model.with_experts(count)
        model.assign(size.rows)
        step = model.decoder(size.rows, 16)
        step()
        layer, x = next(iter(model.layers.values())), torch.randn(size.rows, 1, size.hidden, device=device, dtype=dtype)
        for what, run in (("layer", lambda layer=layer, x=x: layer(x)), ("step", step)):
            waited = _waits(run)
            report.add(
                "waits", f"{count} experts, a {what}: {waited or 'never'}", experts=count, what=what, waits=waited
            )


def _waits(run: Callable[[], Any]) -> str | None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def decode(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    _at_every_size(_decoding, Mixed(size, device, dtype), report)


# of(model, report, rows, experts, copying rate, the average's seconds) -> seconds of a step
Measure = Callable[[Mixed, Report, int, int, float, float | None], float]


def _at_every_size(of: Measure, model: Mixed, report: Report) -> None:
    """The average and then every number of experts, for batches of one row, of some and of many."""
    size, copies = model.size, report.found["machine"][0]["copies"]
    for rows in sorted({1, min(12, size.rows), size.rows}):
        model.plain()
        dense = of(model, report, rows, 0, copies, None)
        for count in size.experts:
            if report.late:
                return
            model.with_experts(count)
            model.assign(rows)
            of(model, report, rows, count, copies, dense)


def _decoding(model: Mixed, report: Report, rows: int, count: int, copies: float, dense: float | None) -> float:
    took = seconds(model.decoder(rows, model.size.context), model.device, model.size.steps)
    moved = (model.weights() + model.cache(rows, model.size.context)) / took
    share = "" if dense is None else f", {dense / took:.2f} of the average's"
    who = f"{count} experts" if count else "the average"
    text = f"{rows} rows, {who}: {rows / took:.0f} tokens/s{share}, {moved / copies:.0%} of the copying rate"
    report.add("decode", text, rows=rows, experts=count, seconds=took, bytes=moved, of_average=dense and dense / took)
    return took


def graphs(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    _at_every_size(_captured, Mixed(size, device, dtype), report)


def _captured(model: Mixed, report: Report, rows: int, count: int, copies: float, dense: float | None) -> float:
    """Seconds of a captured step; on a CPU of one that is not."""
    context, device = model.size.context, model.device
    past = model.hf(model.prompt(rows, context), use_cache=True, logits_to_keep=1).past_key_values
    token, place = model.prompt(rows, 1), torch.full((rows, 1), context, device=device)
    expected = model.hf(token, past_key_values=past, position_ids=place, use_cache=True).logits[:, -1].float()
    past.crop(-1)
    views = []
    for layer in past.layers:
        pair = [F.pad(kept, (0, 0, 0, ROOM)) for kept in (layer.keys, layer.values)]
        views.append((pair[0], pair[1]))
    step = FixedStep(model.hf, views, model.state, mixed=bool(count))
    each = [Row(t, context, 0, n % count if count else 0) for n, t in enumerate(token[:, 0].tolist())]
    if device.type == "cuda":
        step.capture(each, context)
    worst = float((step.run(each, context).float() - expected).norm() / expected.norm())
    took = seconds(lambda: step.run(each, context), device, model.size.steps)
    read = model.weights() + model.cache(rows, context + ROOM)
    share = "" if dense is None else f", {dense / took:.2f} of the average's"
    who = f"{count} experts" if count else "the average"
    text = f"{rows} rows, {who}: {rows / took:.0f} tokens/s{share}, {read / took / copies:.0%} of the copying rate"
    report.add(
        "graphs", f"{text}, {worst:.2g} from eager", rows=rows, experts=count, seconds=took, bytes=read / took,
        of_average=dense and dense / took, worst=worst,
    )  # fmt: skip
    return took


def prefill(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    model, rows = Mixed(size, device, dtype), min(4, size.rows)
    ids = model.prompt(rows, size.prompt)
    dense = seconds(lambda: model.hf(ids, logits_to_keep=1), device, 3)
    report.add("prefill", f"the average: {ids.numel() / dense:.0f} tokens/s", experts=0, seconds=dense)
    for count in size.experts:
        if report.late:
            return
        model.with_experts(count)
        model.assign(rows)
        took = seconds(lambda: model.hf(ids, logits_to_keep=1), device, 3)
        text = f"{count} experts: {ids.numel() / took:.0f} tokens/s, {dense / took:.2f} of the average's"
        report.add("prefill", text, experts=count, seconds=took, of_average=dense / took)


def coded(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    from polymerge.model.triton.check import objection
    from polymerge.model.triton.linear import CodedLinear

    code, shape = code_of("int4", dtype), (size.inner, size.hidden)
    reason = objection([shape], code, device, dtype)
    if reason:
        report.add("coded", f"not run: {reason}", objection=reason)
        return
    count, rank = size.experts[-1], code.rank(*shape, RATE)
    state = Assignment([f"e{n}" for n in range(count)], device)
    weight = torch.randn(shape, device=device, dtype=dtype) * shape[1] ** -0.5
    stored = [
        code.encode(torch.randn(shape[0], rank, device=device), torch.randn(rank, shape[1], device=device))
        for _ in range(count)
    ]
    decoded = [(a.to(dtype), b.to(dtype)) for b, a in (code.decode(tensors, *shape) for tensors in stored)]
    both = {
        "decoded": MixedLinear(state, weight, None, decoded, [1.0] * count, [None] * count).to(device),
        "coded": CodedLinear(state, weight, None, stored, code, [1.0] * count, [None] * count, fused=True).to(device),
    }
    state.set([f"e{n % count}" for n in range(size.rows)], size.rows)
    x = torch.randn(size.rows, 1, shape[1], device=device, dtype=dtype)
    for name, layer in both.items():
        took, held = seconds(partial(layer, x), device, size.steps), sum(b.nbytes for b in layer.buffers())
        report.add("coded", f"{name}: {took * 1e3:.3f} ms, {held / 1e6:.0f} MB", way=name, seconds=took, bytes=held)


def merge(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    for code in ("factors", "int4"):
        for place in dict.fromkeys((device, torch.device("cpu"))):
            took = seconds(partial(_merged, size, code, place), place, 1)
            read = 3 * size.inner * size.hidden * 2 / took
            text = f"{code} on {place.type}: {took:.2f} s for 3 of {size.inner} x {size.hidden}, {read / 1e9:.2f} GB/s"
            report.add("merge", text, code=code, device=place.type, seconds=took, bytes=read)
            if report.late:
                return


def _merged(size: Size, name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    shape = (size.inner, size.hidden)
    experts = [torch.randn(shape, device=device) for _ in range(3)]
    average = sum((w / w.norm() for w in experts), torch.zeros(shape, device=device)) / 3
    code = code_of(name, torch.bfloat16)
    rank = code.rank(*shape, RATE)
    for weight in experts:
        code.encode(*code.factorise(weight / weight.norm() - average, rank, n_oversamples=16, n_iter=2, seed=0))


def base(report: Report, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    for name, library in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        if find_spec(library) is None:
            report.add("base", f"{name}: {library} is not installed", base=name, installed=False)
            continue
        model = Mixed(size, device, dtype, layers=min(4, size.layers))
        exact = seconds(model.decoder(size.rows, size.context), device, size.steps)
        _quantise(model, name)
        took = seconds(model.decoder(size.rows, size.context), device, size.steps)
        text = f"{name}: a step takes {took / exact:.2f} times that of {dtype}"
        report.add("base", text, base=name, seconds=took, sixteen=exact)


def _quantise(model: Mixed, name: str) -> None:
    for module, linear in model.linear.items():
        if name == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(linear, Int8WeightOnlyConfig())
        else:
            import bitsandbytes as bnb

            made = bnb.nn.Linear4bit(
                *linear.weight.shape[::-1], bias=False, compute_dtype=model.dtype, quant_type="nf4"
            )
            made.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            model._put(module, made.to(model.device))


PARTS = (machine, kernel, logits, waits, decode, graphs, prefill, coded, merge, base)


@contextmanager
def told(report: Report, part: str) -> Iterator[None]:
    """A part that fails says why, and the next one runs."""
    try:
        yield
    except Exception as error:  # a driver, a compiler and a full card raise what they like
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        report.add(part, f"failed: {reason}", failed=reason, at=f"{Path(where.filename).name}:{where.lineno}")
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(folder: Path, minutes: float, size: Size, parts: Sequence[str] = ()) -> Report:
    """Runs the parts that were named, or all, for so long; the last one that was begun is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, time.monotonic() + 60 * minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for part in PARTS:
        name = part.__name__
        if parts and name not in ("machine", *parts):
            continue
        if report.late:
            report.add(name, "not run: no time left", late=True)
            continue
        with told(report, name), torch.inference_mode():
            part(report, size, device, dtype)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="no part begins after so long")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for gpu.json and gpu.txt")
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--parts", nargs="+", choices=[part.__name__ for part in PARTS], default=[])
    options = parser.parse_args()
    report = run(options.output, options.minutes, SMALL if options.small else LARGE, options.parts)
    failed = [line for line in report.lines if " failed: " in line]
    print(f"{options.output}/gpu.json; {len(failed)} parts failed" if failed else f"{options.output}/gpu.json")


if __name__ == "__main__":
    main()
