"""Bundles that are wrong on purpose, made by breaking the code as it once was broken, and what `verify` says of them.

Every case is merged twice: as it should be, which must verify, and with the fault in place, which must be named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from polymerge import Bundle, add_expert, merge, verify
from polymerge.bundle.files import Rows
from polymerge.bundle.layer import Borrowed, BundleLayer
from polymerge.bundle.manifest import ExpertRecord
from polymerge.merging import compress, frame, plan, run, treatment, whole
from polymerge.merging.personas import Personas
from polymerge.merging.proof import Proof
from polymerge.method import code
from polymerge.sources import layers
from tests.tiny import COMMON, make_experts, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {**COMMON, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
LLAMA = LlamaConfig(**TINY)
GPT2 = GPT2Config(
    n_embd=16, n_layer=1, n_head=4, vocab_size=96, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
NORM, HEAD = "model.norm.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
OTHER = {"e0": "e1", "e1": "e0"}

Patch = pytest.MonkeyPatch
Experts = dict[str, Path]


def llama(folder: Path) -> Experts:
    return make_experts("llama", folder, count=2, config=LLAMA)


def llama_of(count: int, **save: Any) -> Callable[[Path], Experts]:
    return lambda folder: make_experts("llama", folder, count=count, config=LLAMA, **save)


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def retold(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def after(make: Callable[[Path], Experts], *changes: Callable[[Experts], object]) -> Callable[[Path], Experts]:
    """Experts that were changed after they were made."""

    def made(folder: Path) -> Experts:
        experts = make(folder)
        for change in changes:
            change(experts)
        return experts

    return made


def merged(recipe: Mapping[str, Any], experts: Experts, output: Path) -> Bundle:
    return merge({"experts": {name: str(path) for name, path in experts.items()}, "code": "factors", **recipe}, output)


def grown(recipe: Mapping[str, Any], experts: Experts, output: Path) -> Bundle:
    """The last expert is added."""
    *first, last = experts
    merged(recipe, {name: experts[name] for name in first}, output)
    return add_expert(output, last, experts[last]).bundle


@dataclass(frozen=True)
class Fault:
    """One way to be wrong.

    Attributes:
        breaks: puts the fault into the code.
        words: of the problem that verify must tell.
        experts: of which the wrong bundle is made.
        right: of which a right one can be made, where those are refused by code that is whole.
        plain: verify needs no sources to see it.
    """

    breaks: Callable[[Patch], object]
    words: tuple[str, ...]
    experts: Callable[[Path], Experts] = llama
    right: Callable[[Path], Experts] | None = None
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"compress_rate": 0.5})
    make: Callable[[Mapping[str, Any], Experts, Path], Bundle] = merged
    plain: bool = False


def put(target: Any, name: str, value: Any) -> Callable[[Patch], object]:
    return lambda patch: patch.setattr(target, name, value)


def around(target: Any, name: str, broken: Callable[..., Any]) -> Callable[[Patch], object]:
    """The broken function is given the right one first."""
    right = getattr(target, name)
    return put(target, name, lambda *args, **more: broken(right, *args, **more))


def both(*faults: Callable[[Patch], object]) -> Callable[[Patch], object]:
    return lambda patch: [fault(patch) for fault in faults]


def nothing(*args: Any, **more: Any) -> None: ...


# --- the faults ---


def to_the_other(
    right: Any, task: Any, expert: str, weight: Any, base: Any, ratio: Any, settings: Any, emit: Any, *rest: Any
) -> Any:
    def other(owner: str, *piece: Any) -> None:
        emit(OTHER.get(owner, owner), *piece)

    return right(task, expert, weight, base, ratio, settings, other, *rest)


def ratio_off(right: Any, task: Any, expert: str, *rest: Any) -> Any:
    made = right(task, expert, *rest)
    next(part for part in rest if isinstance(part, compress.TensorReport)).scales[expert] *= 1.02
    return made


def norm_off(right: Any, task: Any, expert: str, weight: Any, base: Any, scales: Any, *rest: Any) -> Any:
    return right(task, expert, weight, base, (1.1 * scales[0], scales[1]), *rest)


def lent_as_it_is(right: Any, *args: Any) -> Any:
    """The other expert's factors, without their scale."""
    return right(*args).model_copy(update={"borrowed": {"e1": Borrowed(of="e0", times=1.0)}})


def lent_as_it_is_in_one(right: Any, task: Any, *args: Any) -> Any:
    return lent_as_it_is(right, task, *args) if task.name == Q else right(task, *args)


def all_lent(right: Any, lent: Any, *rest: Any) -> float:
    """Believed, not measured."""
    error: float = lent.error
    return error


def turned(right: Any, matrix: torch.Tensor, *args: Any, **more: Any) -> Any:
    b, a = right(matrix, *args, **more)
    return (a.T.contiguous(), b.T.contiguous()) if matrix.shape[0] == matrix.shape[1] else (b, a)


def random_factors(right: Any, matrix: torch.Tensor, *args: Any, **more: Any) -> Any:
    return tuple(
        torch.randn_like(factor) * factor.norm() / factor.numel() ** 0.5 for factor in right(matrix, *args, **more)
    )


def biases_swapped(right: Any, task: Any, suffix: str | None = None) -> str:
    key: str = right(task, suffix)
    swapped = {"k_proj": "v_proj", "v_proj": "k_proj"}
    kind = next((kind for kind in swapped if kind in key), None)
    return key.replace(kind, swapped[kind]) if kind and suffix == "lora_B.bias" else key


def without(tensor: str) -> Callable[..., Any]:
    def broken(right: Any, *args: Any) -> Any:
        frame = right(*args)
        return replace(frame, slots={name: slot for name, slot in frame.slots.items() if name != tensor})

    return broken


def norms_forgotten(right: Any, task: Any, settings: Any, read: Any, emit: Any, report: Any) -> Any:
    def other(owner: str | None, *piece: Any) -> None:
        if owner is None or task.record.role != "norm":
            emit(owner, *piece)

    return right(task, settings, read, other, report)


def borrowed_view(right: Any, task: Any, expert: str, dtype: Any, read: Any) -> Any:
    """What arithmetic in place left of the first expert's tensor: the average."""
    mean = Rows(dtype, task.shape, whole._mean(task, dtype, read, {}))
    return mean if expert == "e0" else right(task, expert, dtype, read)


def apart_in_size(experts: Experts) -> Experts:
    """Without a scale of their own the residuals of such two are not one."""
    retold(experts["e1"], lambda tensors: tensors[Q].mul_(1.5))
    return experts


def no_personas(right: Any, checkpoints: Any) -> Personas:
    return replace(right(checkpoints), groups=dict.fromkeys(checkpoints, ()))


def first_for_all(right: Any, task: Any, settings: Any, read: Any, emit: Any, report: Any) -> Any:
    def other(expert: str, *rest: Any) -> torch.Tensor:
        return read("e0" if task.treatment == "average" else expert, *rest)

    return right(task, settings, other, emit, report)


def half_rank(right: Any, *args: Any) -> Any:
    kind, rank = right(*args)
    return kind, (rank + 1) // 2


def plain_layout(right: Any, *args: Any) -> Any:
    return {name: (role, False) for name, (role, _) in right(*args).items()}


def gate_for_up(right: Any, frame: Any, expert: Any) -> Any:
    names = right(frame, expert)
    up, gate = (f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("up", "gate"))
    return names | {up: names[gate], gate: names[up]}


def other_source(right: Any, name: str, checkpoint: Any, *rest: Any) -> ExpertRecord:
    record: ExpertRecord = right(name, checkpoint, *rest)
    return record.model_copy(update={"source": record.source[:-1] + OTHER[name][-1]})


def of_another_module(right: Any, task: Any, note: Any, code: Any) -> BundleLayer:
    layer: BundleLayer = right(task, note, code)
    return layer.model_copy(update={"module": "model.layers.0.input_layernorm"}) if layer.tensor == NORM else layer


# --- the experts ---


def tied_in_words_alone(experts: Experts) -> None:
    for path in experts.values():
        edited(path, tie_word_embeddings=True)


def scores(same: bool) -> Callable[[Experts], None]:
    def change(experts: Experts) -> None:
        for number, path in enumerate(experts.values()):
            value = torch.full((2, 16), 1.0 if same else 1.0 + number)
            retold(path, lambda tensors, value=value: tensors.update({"score.weight": value}))

    return change


def one_more_in_the_second(experts: Experts) -> None:
    retold(experts["e1"], lambda tensors: tensors.update({"model.layers.0.shift": torch.ones(3)}))


def in_bfloat16_with_wide_norms(experts: Experts) -> None:
    for path in experts.values():
        retold(
            path, lambda t: t.update({n: v.to(torch.float32 if n == NORM else torch.bfloat16) for n, v in t.items()})
        )


def too_large_together(experts: Experts) -> None:
    retold(experts["e0"], lambda tensors: tensors[Q].fill_(6e4))
    retold(experts["e1"], lambda tensors: tensors[Q].zero_()[0].__setitem__(0, 1.0))


def talkers(experts: Experts) -> None:
    for path in experts.values():
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = f"w3 {{{{ messages }}}} w{path.name[-1]}"
        tokenizer.save_pretrained(path)


def other_end_token(experts: Experts) -> None:
    (experts["e1"] / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 1}))


def other_rope(experts: Experts) -> None:
    edited(experts["e1"], rope_parameters={"rope_type": "default", "rope_theta": 77777.0})


def last_has_a_head(experts: Experts) -> None:
    *_, last = experts.values()
    edited(last, tie_word_embeddings=False)
    retold(last, lambda tensors: tensors.update({HEAD: 2 * tensors["model.embed_tokens.weight"]}))


TIED = LlamaConfig(**TINY, tie_word_embeddings=True)
three_tied = lambda folder: make_experts("llama-tied", folder, count=3, config=TIED)  # noqa: E731
gpt2 = lambda folder: make_experts("gpt2", folder, count=2, config=GPT2)  # noqa: E731
qwen2 = lambda folder: make_experts("qwen2", folder, count=2, config=Qwen2Config(**TINY))  # noqa: E731

FAULTS: dict[str, Fault] = {
    "a head is dropped where the configuration says that it is tied": Fault(
        put(layers, "_equal", lambda *args: True),
        ("'e0'", "output head of its own", HEAD),
        after(llama, tied_in_words_alone),
    ),
    "a tensor that the model does not know is the first expert's": Fault(
        put(whole, "check_copy", nothing), ("'e1'", "'score.weight'"), after(llama, scores(False)),
        after(llama, scores(True)),
    ),
    "a buffer that one expert alone has": Fault(
        put(frame, "_check_names", nothing), ("'e1'", "model.layers.0.shift"), after(llama, one_more_in_the_second),
        llama,
    ),
    "residuals of another expert": Fault(
        around(compress, "compress_residual", to_the_other), ("'e0'", Q), llama_of(3)
    ),
    "one residual for two experts without its scale": Fault(
        around(run, "bundle_layer", lent_as_it_is_in_one), ("'e1'", Q),
    ),
    "one residual for two experts that have two": Fault(
        around(compress, "_error_with", all_lent), ("'e1'", Q), recipe={"compress_rate": 0.5, "scale": "shared"},
        experts=lambda folder: apart_in_size(llama(folder)),
    ),
    "residuals of another expert in whole numbers": Fault(
        around(compress, "compress_residual", to_the_other), ("'e1'", Q), llama_of(3),
        recipe={"compress_rate": 0.5, "code": "int4"},
    ),
    "residuals of another expert in a table": Fault(
        around(compress, "compress_residual", to_the_other), ("'e0'", HEAD), llama_of(3),
        recipe={"compress_rate": 0.5, "lm_head": "compress", "embedding_rate": 0.5},
    ),
    "a table's ratio that is not the norm's": Fault(
        around(compress, "compress_against", norm_off), ("'e1'", "embed_tokens", "the scale"),
        recipe={"compress_rate": 0.5, "embeddings": "compress", "embedding_rate": 0.5},
    ),
    "whole matrices of another expert": Fault(
        around(compress, "compress_residual", to_the_other), ("'e0'", Q), recipe={"compress_rate": 0.0}
    ),
    "a ratio that is not the residual's": Fault(around(compress, "compress_against", ratio_off), ("'e0'", Q)),
    "a ratio that is not the norm's": Fault(around(compress, "compress_against", norm_off), ("'e0'", Q, "the scale")),
    "a residual the wrong way round": Fault(around(code, "rsvd", turned), ("'e0'", Q, "without")),
    "a residual of random numbers": Fault(around(code, "rsvd", random_factors), ("'e1'", Q, "without")),
    "a rank that the rate does not give": Fault(
        around(treatment, "treatment_of", half_rank), ("base", Q, "the method gives"), plain=True
    ),
    "a matrix the wrong way round": Fault(
        around(layers, "_roles", plain_layout), ("base", "c_attn", "[in, out]"), gpt2, plain=True
    ),
    "biases of two modules swapped": Fault(
        around(whole, "adapter_key", biases_swapped), ("'e0'", "k_proj.bias"), qwen2
    ),
    "matrices of two modules swapped": Fault(
        around(frame, "names_in", gate_for_up), ("'e0'", "gate_proj.weight"), recipe={"compress_rate": 0.0}
    ),
    "a tensor is missing": Fault(
        both(around(plan, "frame_of", without(NORM)), put(frame, "_check_names", nothing)), ("base", NORM),
        plain=True,
    ),
    "an expert's own norms are left out": Fault(around(compress, "keep_or_average", norms_forgotten), ("'e0'", NORM)),
    "a first expert's tensor is overwritten in place": Fault(
        around(whole, "stored_rows", borrowed_view), ("'e0'", HEAD)
    ),
    "a tensor under another module's name": Fault(
        around(run, "bundle_layer", of_another_module), ("base", NORM, "input_layernorm"),
        recipe={"compress_rate": 1.0, "norms": "average"}, plain=True,
    ),
    "another's chat template": Fault(
        around(plan, "personas_of", no_personas), ("'e1'", "template"), after(llama, talkers)
    ),
    "another's end token": Fault(
        around(plan, "personas_of", no_personas), ("'e1'", "generation"), after(llama, other_end_token)
    ),
    "another's rope": Fault(around(plan, "personas_of", no_personas), ("'e1'", "positions"), after(llama, other_rope)),
    "another's epsilon": Fault(
        put(plan, "check_settings", nothing), ("'e1'", "rms_norm_eps"),
        after(llama, lambda experts: edited(experts["e1"], rms_norm_eps=1e-2)), llama,
    ),
    "a norm in float32 is rounded to bfloat16": Fault(
        put(plan, "with_dtypes", lambda tasks, *args: tasks), ("'e0'", NORM), after(llama, in_bfloat16_with_wide_norms)
    ),
    "an average beyond its dtype": Fault(
        put(compress, "check_stored", nothing), ("base", Q, "NaN or infinite"), after(llama, too_large_together), llama,
        recipe={"compress_rate": 0.0, "dtype": "float16"}, plain=True,
    ),
    "the first expert's norm for the average": Fault(
        around(compress, "keep_or_average", first_for_all), ("base", NORM, "average"),
        recipe={"compress_rate": 0.5, "norms": "average"},
    ),
    "an untied expert in a tied bundle": Fault(
        put(frame, "_check_names", nothing), ("'e2'", "output head of its own"), after(three_tied, last_has_a_head),
        three_tied, make=grown,
    ),
    "the source of another expert": Fault(around(run, "expert_record", other_source), ("'e0'", Q)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof before a merge would see some of these; here it is the verifier's turn."""
    monkeypatch.setattr(run, "prove", lambda *args, **more: Proof("any", True, "groups"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_bundle_is_named_and_the_right_one_is_not(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    experts = fault.experts(tmp_path)
    fine = fault.right(tmp_path / "right") if fault.right else experts
    whole = fault.make(fault.recipe, fine, tmp_path / "whole")
    assert verify(whole, sources=True).problems == []
    with pytest.MonkeyPatch.context() as patch:
        fault.breaks(patch)
        wrong = fault.make(fault.recipe, experts, tmp_path / "wrong")
    problems = verify(wrong, sources=True).problems
    assert any(all(word in problem for word in fault.words) for problem in problems), problems
    assert bool(verify(wrong).problems) is fault.plain


def test_an_average_is_not_asked_for_after_an_expert_came_or_went(tmp_path: Path) -> None:
    experts = make_experts("llama", tmp_path, count=3, config=LLAMA)
    bundle = grown({"compress_rate": 0.5, "norms": "average"}, experts, tmp_path / "b")
    assert verify(bundle, sources=True).problems == []
