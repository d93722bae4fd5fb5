"""Models in memory as experts: each is written to a folder for the time of a merge.

Knows transformers' and PEFT's `save_pretrained`, and that a merge reads files. Does not know what is done with them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import SourceError

# What a manifest calls the source of an expert that came from memory.
PREFIX = "memory:"
ADAPTER_CONFIG = "adapter_config.json"


@contextmanager
def models_as_folders(recipe: Any, beside: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A recipe in which every model in memory stands as a folder, and their names with what their source is called.

    A model is a `PreTrainedModel` or a `PeftModel`, or a pair of it and its tokenizer. Without one, the tokenizer is
    that of the folder that the model was loaded from, where that is there. The folders lie beside the output, where
    there is room for a bundle, and are gone when the block ends.

    Raises:
        SourceError: a model of another kind, or an adapter over a model that no folder or hub id names.
    """
    experts = _experts_of(recipe)
    models = {name: value for name, value in experts.items() if _is_model(value)}
    if not models:
        yield recipe, {}
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.models-", dir=beside.parent))
    try:
        written = {name: str(_written(name, model, folder / name)) for name, model in models.items()}
        replaced = {**experts, **written}
        inside = isinstance(recipe.get("experts"), Mapping)
        yield ({**recipe, "experts": replaced} if inside else replaced), {name: PREFIX + name for name in models}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_models(recipe: Any) -> None:
    """For what reads files alone. Raises SourceError for a model in memory."""
    for name, value in _experts_of(recipe).items():
        if _is_model(value):
            raise SourceError(
                f"expert {name!r}: a model in memory, which `merge` alone takes; save it with save_pretrained and give "
                "its folder, or give a hub id, a GGUF file or an adapter's folder"
            )


def _experts_of(recipe: Any) -> Mapping[str, Any]:
    if not isinstance(recipe, Mapping):
        return {}
    experts = recipe.get("experts")
    return experts if isinstance(experts, Mapping) else recipe


def _is_model(value: Any) -> bool:
    """Also of what is in memory and no model, which is then refused by name."""
    part = _parts(value)[0]
    return hasattr(part, "save_pretrained") or isinstance(part, nn.Module) or _is_weights(part)


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _parts(value: Any) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    return value if isinstance(value, tuple) and len(value) == 2 else (value, None)


def _written(name: str, value: Any, folder: Path) -> Path:
    from transformers import PreTrainedModel

    model, tokenizer = _parts(value)
    if hasattr(model, "peft_config"):
        folder = _written_adapter(name, model, folder)
    elif isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    elif _is_weights(model):
        raise SourceError(f"expert {name!r}: weights alone do not say their architecture; give the model that has them")
    else:
        raise SourceError(f"expert {name!r}: a {type(model).__name__} is neither a transformers model nor PEFT's")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    else:
        _copy_tokenizer(str(getattr(model, "name_or_path", "")), folder)
    return folder


def _written_adapter(name: str, model: Any, folder: Path) -> Path:
    """The folder of the active adapter. PEFT names the base by where it was loaded from, and writes no base."""
    active = model.active_adapters[0] if not callable(model.active_adapters) else model.active_adapters()[0]
    if not getattr(model.peft_config[active], "base_model_name_or_path", None):
        raise SourceError(
            f"expert {name!r}: its adapter's base was made in memory, so no folder names it; give "
            "model.merge_and_unload() in its place, or save the base and load it from there"
        )
    model.save_pretrained(folder, selected_adapters=[active])
    return next(file.parent for file in folder.rglob(ADAPTER_CONFIG))


def _copy_tokenizer(loaded_from: str, folder: Path) -> None:
    from .persona import MORE_TEMPLATES, OLD_TEMPLATE, TEMPLATE, TOKENIZER_FILES

    place = Path(loaded_from)
    if not loaded_from or not place.is_dir():
        place = _cached(loaded_from)
    for file in (*TOKENIZER_FILES, TEMPLATE, OLD_TEMPLATE):
        if (place / file).is_file():
            shutil.copyfile(place / file, folder / file)
    if (place / MORE_TEMPLATES).is_dir():
        shutil.copytree(place / MORE_TEMPLATES, folder / MORE_TEMPLATES)


def _cached(repo: str) -> Path:
    """The folder of the hub's cache that a hub id was loaded from; one that is not there for anything else."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        config = None
    return Path(config).parent if isinstance(config, str) else Path("/nonexistent")
