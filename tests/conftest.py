"""Fixtures that many tests share. The network is off: whatever would reach a hub fails at once. So is the GPU, unless
CUDA_VISIBLE_DEVICES names one: what tests compare is equal to the last digits that a CPU's float32 keeps."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from polymerge import Bundle, merge
from polymerge.host import cache_folder
from tests.tiny import make_experts

transformers.logging.set_verbosity_error()
torch.manual_seed(0)

Merged = Callable[..., tuple[Bundle, dict[str, Path]]]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests cache goes with them; what takes minutes to make again (unpacked packages, trained models) is kept."""
    real, folder = cache_folder(), tmp_path_factory.mktemp("cache")
    for kept in ("gguf", "demo", "tests"):
        (real / kept).mkdir(parents=True, exist_ok=True)
        (folder / kept).symlink_to(real / kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMERGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Tiny experts of an architecture, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, dict[str, Path]] = {}

    def get(architecture: str) -> dict[str, Path]:
        if architecture not in made:
            made[architecture] = make_experts(architecture, folder)
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def merged(checkpoints: Callable[[str], dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A bundle of an architecture's tiny experts, with published factors unless another code is named, and these
    experts; the same arguments give the same bundle."""
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[str, Bundle] = {}

    def get(architecture: str, **recipe: object) -> tuple[Bundle, dict[str, Path]]:
        experts = checkpoints(architecture)
        key = f"{architecture}-{abs(hash(str(sorted(recipe.items()))))}"
        if key not in made:
            sources = {name: str(path) for name, path in experts.items()}
            made[key] = merge({"experts": sources, "code": "factors", **recipe}, folder / key)
        return made[key], experts

    return get


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: threads would cost more than they give. Processes that are killed or compared run so too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
