"""Sums whose experts a tensor names, against each row's own matrices; the kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from polymerge.model import numbered
from polymerge.model.numbered import Numbered

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# rows, in, out, ranks
SHAPES = [(5, 1500, 130, (35, 0, 3)), (1, 64, 64, (4,)), (20, 1100, 70, (40, 83))]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own functions decide when they are imported whether they are interpreted."""
    if DEVICE.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("run by the test below")
    monkeypatch.setattr(numbered, "has_kernels", lambda device: True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="they run as they are")
def test_the_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs the extra `triton`")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "of_the_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


class Layer:
    def __init__(self, rows: int, width: int, out: int, ranks: tuple[int, ...]) -> None:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(DEVICE)

        self.base, self.x = normal(out, width), normal(rows, width)
        self.a, self.b = normal(sum(ranks), width), normal(sum(ranks), out)
        self.offsets = [sum(ranks[:n]) for n in range(len(ranks) + 1)]
        self.ratios = [0.5 + 0.3 * n for n in range(len(ranks))] + [1.0]
        self.numbers = (torch.arange(rows) % (len(ranks) + 1)).to(DEVICE)

    def factors(self, base: torch.Tensor | None = None) -> Numbered:
        return Numbered(self.a.clone(), self.b, self.offsets, self.ratios, base)

    def expected(self) -> torch.Tensor:
        rows = []
        for x, number in zip(self.x, self.numbers.tolist(), strict=True):
            begin, end = [*self.offsets, self.offsets[-1]][number : number + 2]
            rows.append(self.ratios[number] * self.base @ x + self.b[begin:end].T @ (self.a[begin:end] @ x))
        return torch.stack(rows)


def check(got: torch.Tensor, layer: Layer) -> None:
    expected = layer.expected()
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_sum(shape: Any) -> None:
    layer = Layer(*shape)
    y = layer.x @ layer.base.T
    layer.factors().add(y, layer.x, layer.numbers)
    check(y, layer)


@pytest.mark.parametrize("shape", SHAPES)
def test_of_the_kernels_after_the_bases_product_and_with_the_base_in_one(kernels: None, shape: Any) -> None:
    layer = Layer(*shape)
    y = (layer.x @ layer.base.T)[:, None]
    layer.factors().add(y, layer.x[:, None], layer.numbers)
    check(y[:, 0], layer)
    joined = layer.factors(layer.base)
    assert joined.joined is not None and len(joined.joined) % numbered.ROUND == 0
    assert torch.equal(joined.a, layer.a) and joined.a.data_ptr() == joined.joined[len(layer.base)].data_ptr()
    check(joined.product(layer.x[:, None], layer.numbers)[:, 0], layer)


def test_of_the_kernels_few_rows_of_many_experts_do_not_read_all_of_them(kernels: None) -> None:
    layer = Layer(2, 64, 64, (16,) * 8)
    assert not layer.factors(layer.base).joins(2) and layer.factors(layer.base).joins(8)
    assert not layer.factors().joins(8)
