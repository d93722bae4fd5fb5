"""Proved before a merge reads a tensor: that a bundle of this architecture answers as its experts do.

The architecture is built small from the experts' own configuration, with two random experts in which every tensor
differs. They are merged and loaded as any others, and a mixed batch, padded, and a step with the cache, are compared
with each expert's dense model alone. It costs seconds, once for a configuration in a process.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.bundle import Bundle
from ..bundle.stored import dense_state
from ..errors import PolymergeError, SourceError
from ..method.codes import PUBLISHED
from ..model.loading import load_model
from ..model.mixed import MixedModel
from ..sources.checkpoint import Checkpoint
from ..sources.classes import opener_of
from ..sources.layers import meta_model
from .small import small_configs

logger = logging.getLogger(__name__)

# Largest difference of two logits, relative to the largest logit.
CLOSE = 1e-4
# Parameters of a small model at most.
MOST = 20_000_000
ROWS = ("one", "two", None, "two")
LENGTHS = (7, 4, 7, 5)
Merge = Callable[[dict[str, Any], Path], Bundle]


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        proved: off where no small model could be built; the merge goes on, and the bundle says so.
        strategy: how a mixed batch is run.
        reason: why there is no proof.
    """

    architecture: str
    proved: bool
    strategy: str = ""
    reason: str = ""

    @property
    def note(self) -> str:
        """A line for the manifest. It holds no measured figure: the same merge gives the same bytes."""
        if not self.proved:
            return f"not proved: {self.architecture} could not be built small ({self.reason})"
        return (
            f"proved: {self.architecture}, built small, answers a mixed batch (in {self.strategy}) within {CLOSE:g} of "
            "each expert alone"
        )


class NotSmall(Exception):
    """There is no small model of this architecture."""


def prove(checkpoint: Checkpoint, merge: Merge, *, exact: bool, tables: Sequence[str] = ()) -> Proof:
    """Tries the architecture of a checkpoint.

    Args:
        merge: makes a bundle of a recipe and a folder, without a proof of its own.
        exact: experts are kept whole (rate 0); otherwise they are compressed, and compared with what a bundle holds.
        tables: keys of the recipe whose tensors are compressed beside the linear weights: embeddings, lm_head.

    Raises:
        SourceError: a bundle of this architecture does not answer as its experts do, or it does not go on with a text.
    """
    model = meta_model(checkpoint.folder)
    if model is None:
        kind = checkpoint.config.get("model_type", "unknown")
        return Proof(str(kind), False, reason="the installed transformers does not know it")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name, reason = type(model).__name__, ""
    for settings in small_configs(json.loads(json.dumps(model.config.to_dict(), default=str)), parameters):
        try:
            return Proof(name, True, _proved(json.dumps(settings, sort_keys=True), merge, exact, tuple(tables)))
        except NotSmall as error:
            reason = reason or str(error)
        except PolymergeError as error:
            raise SourceError(f"{name}: a small model of this architecture cannot be a bundle: {error}") from None
    wanted = _wants_more(model)
    if wanted:
        raise SourceError(f"{checkpoint.label}: {name} does not go on with a text alone: {wanted}")
    return Proof(name, False, reason=reason)


def _wants_more(model: Any) -> str:
    """What a model of images or sound objects to when it gets tokens alone. It holds no numbers here; what it cannot do
    without them is no objection."""
    if opener_of(model.config).__name__ == "AutoModelForCausalLM":
        return ""
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model.eval()(input_ids=tokens)
    except (TypeError, ValueError) as error:
        return " ".join(str(error).split())[:160]
    except Exception as error:
        logger.debug("%s on the meta device: %s", type(model).__name__, error)
    return ""


@functools.cache
def _proved(settings: str, merge: Merge, exact: bool, tables: tuple[str, ...]) -> str:
    """How the rows of a small model are run, after it was tried."""
    with _kept(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rates = {"compress_rate": 0.0 if exact else 0.5, **({"embedding_rate": 0.5} if tables else {})}
        recipe = {"code": PUBLISHED, **rates, **dict.fromkeys(tables, "compress")}
        return _tried(json.loads(settings), Path(folder), merge, recipe)


def _tried(settings: Mapping[str, Any], folder: Path, merge: Merge, recipe: Mapping[str, Any]) -> str:
    experts = random_experts(settings, folder)
    bundle = merge({"experts": {name: str(path) for name, path in experts.items()}, **recipe}, folder / "bundle")
    model = load_model(bundle, device="cpu", dtype="float32")
    dense = {name: _dense(model.hf, bundle, name) for name in (*experts, None)}
    inputs = batch_for(model.hf)
    alone = [dense[name](**_row(inputs, number)).logits for number, name in enumerate(ROWS)]
    together = model(**inputs, experts=list(ROWS)).logits
    for number, name in enumerate(ROWS):
        _compare(name, together[number : number + 1, -LENGTHS[number] :], alone[number][:, -LENGTHS[number] :])
    if model.strategy == "groups" and model.hf.can_generate():  # the cache is taken apart
        _compare_steps(model, dense, inputs)
    return model.strategy


def _compare_steps(model: MixedModel, dense: Mapping[str | None, Any], inputs: Mapping[str, Tensor]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**inputs, experts=list(ROWS), **options).logits
    plain = dense["two"].generate(**inputs, **options).logits
    for number, name in enumerate(ROWS):
        alone = dense[name].generate(**_row(inputs, number), **options).logits
        if name == "two" and not torch.allclose(plain[-1][number : number + 1], alone[-1], atol=1e-3):
            return  # it mixes the rows of a batch by itself (RWKV)
        _compare(name, together[-1][number : number + 1], alone[-1])


def random_experts(settings: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Two checkpoints in which every tensor differs. Raises NotSmall."""
    import transformers

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with torch.device("meta"):
            wide = sum(p.numel() for p in opener_of(config).from_config(config).parameters())
        if wide > MOST:
            raise NotSmall(f"{wide / 1e6:.0f} million parameters")
        model = opener_of(config).from_config(config).float().eval()
        state = {k: v for k, v in model.state_dict().items() if v.is_floating_point() and bool(v.isfinite().all())}
        paths = {}
        for name in ("one", "two"):
            for value in {value.data_ptr(): value for value in state.values()}.values():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
            paths[name] = folder / name
            model.save_pretrained(paths[name])
        if not bool(model(**batch_for(model)).logits.isfinite().all()):
            raise NotSmall("its answers are not numbers")
    except NotSmall:
        raise
    except Exception as error:
        raise NotSmall(" ".join(f"{type(error).__name__}: {error}".split())[:120]) from None
    return paths


def _dense(hf: Any, bundle: Bundle, expert: str | None) -> Any:
    """The model that an expert, or the average, is in the bundle, by transformers' own hand."""
    state = dense_state(bundle, expert)
    config = type(hf.config).from_pretrained(bundle.path)
    return type(hf).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def batch_for(model: Any) -> dict[str, Tensor]:
    """Random tokens for a small model, padded."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary // 2, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    takes = inspect.signature(model.forward).parameters
    return {"input_ids": ids, "attention_mask": mask} if "attention_mask" in takes else {"input_ids": ids}


def _row(inputs: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name: value[number : number + 1] for name, value in inputs.items()}


def _compare(expert: str | None, got: Tensor, expected: Tensor) -> None:
    far = float((got - expected).abs().max() / expected.abs().max())
    if not far <= CLOSE:
        raise SourceError(f"a mixed batch of small experts is {far:.2g} off for {expert or 'the average'}")


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Leaves the caller's random numbers and threads as they were; small matrices are faster with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
