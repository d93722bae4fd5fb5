"""The peers of benchmarks/peers.py against their definitions, on tiny matrices and models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from peer_methods import adapters, bitdelta, mergekit, ours, smile, twin
from peer_methods.lowrank import GatedLinear, truncated_svd
from peer_methods.measure import Held, agreements
from peer_methods.served import InTurn, Served
from peer_methods.table import METHODS, experts_folder
from peer_methods.task import Cost, Task, run_apart
from polymerge.demo.skills import Skill, SkillExample
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 13, 7, 21]])


def logits_of(path: str) -> Tensor:
    with torch.no_grad():
        logits: Tensor = transformers.AutoModelForCausalLM.from_pretrained(path)(IDS).logits
        return logits


def test_a_forced_gate_at_full_rank_is_that_expert() -> None:
    base, experts = torch.randn(5, 7), torch.randn(3, 5, 7)
    inner = nn.Linear(7, 5, bias=False)
    inner.weight.data = base
    factors = [truncated_svd(expert - base, 5) for expert in experts]
    x = torch.randn(2, 4, 7)
    for number, expert in enumerate(experts):
        layer = GatedLinear(inner, [a for _, a in factors], [b for b, _ in factors], lambda z, n=number: one_hot(n))
        torch.testing.assert_close(layer(x), x @ expert.T, atol=1e-4, rtol=1e-4)


def one_hot(number: int) -> Tensor:
    return F.one_hot(torch.tensor(number), 3).float()


def test_smile_sends_a_token_where_its_input_reaches_farthest() -> None:
    deltas = torch.randn(3, 6, 8)
    a = torch.stack([truncated_svd(delta, 4)[1] for delta in deltas])
    x = torch.randn(2, 5, 8)
    z = torch.einsum("bti,eri->bter", x, a)
    directions = torch.linalg.svd(deltas).Vh[:, :2]
    expected = torch.einsum("bti,eki->btek", x, directions).norm(dim=-1).argmax(dim=-1)
    gates = smile.norm_gate(a, router_rank=2)(z)
    assert torch.equal(gates.argmax(dim=-1), expected)
    assert torch.equal(gates.sum(dim=-1), torch.ones(2, 5)) and len(expected.unique()) > 1


def test_smile_with_experts_that_are_one_is_that_expert(task: Task, tmp_path: Path) -> None:
    full = -1.0  # a rate whose ranks are no smaller than the matrices'
    same = Task(dict.fromkeys(task.experts, task.experts["e1"]), task.base, full, task.texts)
    same.save(tmp_path / "task.json")
    smile.merge(str(tmp_path / "task.json"), str(tmp_path))
    logits = smile.serve(same, tmp_path).logits(IDS, 2, "e1")
    assert rounded_off(logits, logits_of(task.experts["e1"])) < 0.02 < rounded_off(logits, logits_of(task.base))


def rounded_off(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("width", [8, 13])
def test_bitdelta_keeps_the_signs_and_the_nearest_scale(width: int) -> None:
    delta = torch.randn(6, width)
    signs, scale = bitdelta.encode(delta)
    kept = bitdelta.decode(signs, scale, width)
    assert torch.equal(kept.sign(), delta.sign()) and signs.shape == (6, -(-width // 8))
    errors = [float((delta - share * kept).norm()) for share in (0.99, 1.0, 1.01)]
    assert errors[1] < min(errors[0], errors[2])


def test_bitdelta_of_nothing_is_nothing() -> None:
    assert not bitdelta.decode(*bitdelta.encode(torch.zeros(2, 9)), 9).any()


def test_bitdelta_serves_base_plus_signs_and_the_experts_own_norms(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    bitdelta.merge(str(tmp_path / "task.json"), str(tmp_path))
    served = bitdelta.serve(task, tmp_path)
    assert isinstance(served, InTurn)
    name = "model.layers.1.mlp.up_proj.weight"
    weight, base = task.checkpoints["e2"].read(name), task.pretrained.read(name)
    weights = dict(served.models["e2"].named_parameters())
    torch.testing.assert_close(weights[name], base + (weight - base).sign() * (weight - base).abs().mean())
    assert torch.equal(weights["model.norm.weight"], task.checkpoints["e2"].read("model.norm.weight"))
    assert experts_folder(task, tmp_path) == sum(f.stat().st_size for f in (tmp_path / "experts").iterdir())


@pytest.fixture(scope="module")
def twins(task: Task, tmp_path_factory: pytest.TempPathFactory) -> twin.Twin:
    folder = tmp_path_factory.mktemp("twin")
    twin._merge(task, folder, {name: min(shape) for name, shape in task.linear().items()})
    return twin.Twin(task, folder)


def test_twin_at_full_rank_with_one_weight_is_that_expert(task: Task, twins: twin.Twin) -> None:
    for number, path in enumerate(task.experts.values()):
        twins._set(one_hot(number)[None])
        assert rounded_off(twins.model(IDS).logits, logits_of(path)) < 0.02
    twins._set(torch.zeros(1, 3))
    assert rounded_off(twins.model(IDS).logits, logits_of(task.experts["e0"])) > 0.02


def test_twin_shares_task_arithmetic_at_the_published_scale(task: Task) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    base, experts = task.pretrained.read(name), [c.read(name) for c in task.checkpoints.values()]
    torch.testing.assert_close(twin._shared(task)(name), base + 0.3 * sum(expert - base for expert in experts))


def test_twin_gives_every_row_of_a_batch_its_own_weights(twins: twin.Twin) -> None:
    weights = torch.softmax(torch.randn(2, 3), dim=-1)
    alone = []
    for row in weights:
        twins._set(row[None])
        alone.append(twins.model(IDS).logits)
    twins._set(weights)
    torch.testing.assert_close(twins.model(IDS.repeat(2, 1)).logits, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_twin_learns_to_weigh_experts() -> None:
    centres = 3 * F.one_hot(torch.arange(3), 16).float()
    labels = torch.arange(3).repeat(40)
    states = centres[labels] + 0.3 * torch.randn(120, 16)
    router = twin.train_router(states, labels, 3)
    assert (router(centres).argmax(dim=-1) == torch.arange(3)).all()


def test_arrow_with_adapters_that_are_one_is_that_adapter(task: Task, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = transformers.AutoModelForCausalLM.from_pretrained(task.base)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapter = get_peft_model(base, config)
    for name in task.experts:
        adapter.save_pretrained(tmp_path / "experts" / name)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(task.base)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(fresh, tmp_path / "experts" / "e0")(IDS).logits
        logits = adapters.serve_arrow(task, tmp_path).logits(IDS, 2, "e0")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert rounded_off(logits, logits_of(task.base)) > 0.02


def test_the_one_rank_of_extracted_adapters_pays_at_least_polymerges_bytes(task: Task) -> None:
    sizes = {name: sum(shape) for name, shape in task.linear().items()}
    paid = sum(task.ranks()[name] * size for name, size in sizes.items())
    rank = mergekit.equal_rank(task)
    assert (rank - 1) * sum(sizes.values()) < paid <= rank * sum(sizes.values())


def test_polymerges_bytes_are_those_of_its_tensors_with_factors_at_16_bits(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    ours.make(str(tmp_path / "task.json"), str(tmp_path), routed=False, code="factors")
    expected = 0
    for name in task.experts:
        tensors = load_file(tmp_path / "bundle" / "experts" / name / "adapter_model.safetensors")
        expected += sum((2 if ".lora_" in key else 4) * tensor.numel() for key, tensor in tensors.items())
    headers = 3 * 10_000  # names and shapes, and the scales' file
    assert expected < ours.beside_one_model(tmp_path) < expected + headers
    served = ours.Ours(tmp_path, routed=False)
    factors = [m for m in served.model.modules() if hasattr(m, "stacked_a")]
    assert factors and all(torch.equal(m.stacked_a, m.stacked_a.bfloat16().float()) for m in factors)


def test_rows_that_run_in_turn_come_back_in_their_order() -> None:
    class Says:
        def __init__(self, token: int, length: int) -> None:
            self.new = torch.full((1, length), token)

        def generate(self, ids: Tensor, **_: Any) -> Tensor:
            return torch.cat([ids, self.new.expand(len(ids), -1)], dim=1)

    served = InTurn({"a": Says(50, 1), "b": Says(60, 2)}, tiny_tokenizer())
    ids = torch.tensor([[3], [4], [5]])
    tokens = served.generate(ids, torch.ones_like(ids), ["b", "a", "b"])
    assert tokens.tolist() == [[3, 60, 60], [4, 50, 0], [5, 60, 60]]


def test_kl_is_measured_with_the_request_marked_and_is_nothing_for_the_original(task: Task) -> None:
    examples = (SkillExample("w5 w6", "w7"), SkillExample("w9 w8 w11", "w4 w3"))
    held = Held.of([Skill("e0", (), examples)], task.experts, compared=2)
    seen = []

    class Original(Served):
        tokenizer = tiny_tokenizer()
        model = transformers.AutoModelForCausalLM.from_pretrained(task.experts["e0"])

        def logits(self, ids: Tensor, prompt: int, expert: str) -> Tensor:
            seen.append(self.tokenizer.decode(ids[0, :prompt]))
            logits: Tensor = self.model(ids).logits
            return logits

        def generate(self, *_: Any, **__: Any) -> Tensor:
            raise AssertionError("not asked for")

    agreement = agreements(Original(), held)["e0"]
    assert seen == ["w5 w6", "w9 w8 w11"]
    assert abs(agreement.kl) < 1e-6 and agreement.top1 == 1.0 and agreement.tokens == 5


def test_a_call_apart_tells_its_memory_and_its_failure(tmp_path: Path) -> None:
    cost = run_apart("json:dumps", [1])
    assert cost.seconds > 0 and cost.peak > 2**20
    assert Cost(1.0, 5) + Cost(2.0, 3) == Cost(3.0, 5)
    with pytest.raises(SystemExit, match=r"json:loads failed: json\.decoder\.JSONDecodeError"):
        run_apart("json:loads", "{")


def test_a_task_is_the_same_after_a_file(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    assert Task.load(tmp_path / "task.json") == task
    assert json.loads((tmp_path / "task.json").read_text())["rate"] == 0.5


@pytest.mark.parametrize("norms", [True, False])
def test_named_adapters_answer_the_same_alone_and_together(task: Task, tmp_path: Path, norms: bool) -> None:
    from peft import LoraConfig, get_peft_model

    modules = ["norm", "input_layernorm"] if norms else []
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False)
    for number, name in enumerate(task.experts):
        adapter = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(task.base), config)
        for key, parameter in adapter.named_parameters():
            if "modules_to_save" in key or "lora_B" in key:
                parameter.data += 0.2 * number
        adapter.save_pretrained(tmp_path / "experts" / name)
    served = (adapters.serve if norms else adapters.serve_without_norms)(task, tmp_path)
    mask, names = torch.ones_like(IDS).repeat(3, 1), list(task.experts)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    together = served.generate(IDS.repeat(3, 1), mask, names, **options)
    alone = [served.generate(IDS, mask[:1], [name], **options) for name in names]
    assert torch.equal(together, torch.cat(alone)) and served.one_batch is not norms
    assert len({round(float(served.logits(IDS, 2, name).detach().sum()), 3) for name in names}) == 3


def test_rows_do_not_share_a_folder_and_only_mergekits_need_mergekit(task: Task, tmp_path: Path) -> None:
    assert len({method.folder for method in METHODS}) == len(METHODS)
    for method in METHODS:
        if method.mergekit:
            with pytest.raises(ValueError, match="mergekit"):
                method.merge(task, tmp_path)
