"""Experts that the benchmarks of peers are tried on."""

import pytest
import transformers

from peer_methods.task import Task
from tests.tiny import make_experts, tiny_tokenizer


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A base and three experts that share its embedding, so that a method that has one for all can be exact."""
    folder = tmp_path_factory.mktemp("peers")
    base, *experts = make_experts("llama-tied", folder, count=4).values()
    start = transformers.AutoModelForCausalLM.from_pretrained(base)
    for path in experts:
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        model.get_input_embeddings().weight.data.copy_(start.get_input_embeddings().weight)
        model.save_pretrained(path)
    for path in (base, *experts):
        tiny_tokenizer().save_pretrained(path)
    texts = {f"e{n}": [f"w{3 + 10 * n + i} w{4 + 10 * n}" for i in range(6)] for n in range(3)}
    return Task({f"e{n}": str(path) for n, path in enumerate(experts)}, str(base), 0.5, texts)
