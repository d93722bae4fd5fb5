"""adapter_config.json of a LoRA adapter: what it asks for, and whether it can be read into its base's weights.

Knows PEFT's settings and which of them leave the weights as they are. Knows nothing of tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .checkpoint import read_json
from .lora import Start

ADAPTER_CONFIG = "adapter_config.json"
# Settings under which an adapter is no change of its base's weights, or one that this version does not know.
UNREAD = (
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
)
# The others of PEFT's that begin or end as new variants do.
READ = ("use_dora", "use_rslora")
FOR_TRAINING = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "runtime_config")
_VARIANT = re.compile(r"use_.+|.+_config")
# Starts that PEFT takes out of the base whenever it loads the adapter: from random numbers, data or a quantised base.
CHANGES_ITS_BASE = ("pissa_niter", "loftq", "corda", "lora_ga")
STARTS: tuple[Start, ...] = ("pissa", "olora")


def check_adapter(folder: Path, label: str) -> dict[str, Any]:
    """The adapter's settings. Raises SourceError where it can't be read into its base's weights."""
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise SourceError(f"{label}: a {settings.get('peft_type')} adapter; only LORA can be merged")
    unknown = (key for key in settings if _VARIANT.fullmatch(key) and key not in (*READ, *FOR_TRAINING, *UNREAD))
    used = [key for key in (*UNREAD, *sorted(unknown)) if settings.get(key)]
    init = _init(settings)
    used += [f"init_lora_weights={init}"] if init.startswith(CHANGES_ITS_BASE) else []
    if used:
        raise SourceError(
            f"{label}: the adapter uses {used[0]}, which a merge does not read; merge it into its base first"
        )
    _check_scaling(settings, folder / ADAPTER_CONFIG)
    _check_tokens(settings, folder / ADAPTER_CONFIG)
    return settings


def start_of(settings: Mapping[str, Any]) -> Start:
    """What PEFT takes out of the base when it loads the adapter."""
    return next((start for start in STARTS if start == _init(settings)), "zero")


def scaling_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor on B A."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def is_saved_whole(settings: Mapping[str, Any], module: str) -> bool:
    """Whether a module is one of `modules_to_save`: a copy of the adapter's own beside the base's."""
    names = settings.get("modules_to_save") or []
    return any(module == name or module.endswith(f".{name}") for name in names)


def token_indices(settings: Mapping[str, Any], module: str) -> tuple[int, ...] | None:
    """The rows of a module's table that the adapter replaces; a plain list means the input embedding."""
    indices = settings.get("trainable_token_indices")
    if not isinstance(indices, dict):
        return tuple(indices) if indices else None
    named = next((rows for name, rows in indices.items() if module == name or module.endswith(f".{name}")), None)
    return tuple(named) if named else None


def _init(settings: Mapping[str, Any]) -> str:
    return str(settings.get("init_lora_weights")).lower()


def _check_scaling(settings: Mapping[str, Any], file: Path) -> None:
    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise SourceError(f"{file}: alpha_pattern must map names to numbers")
    for name, alpha in {"lora_alpha": settings.get("lora_alpha", 8), **pattern}.items():
        try:
            re.compile(name)
        except re.error as error:
            raise SourceError(f"{file}: alpha_pattern: {name!r} is not a pattern ({error})") from None
        if not isinstance(alpha, int | float):
            raise SourceError(f"{file}: the alpha of {name!r} must be a number, found {alpha!r}")


def _check_tokens(settings: Mapping[str, Any], file: Path) -> None:
    indices = settings.get("trainable_token_indices") or []
    for rows in indices.values() if isinstance(indices, dict) else [indices]:
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows):
            raise SourceError(f"{file}: trainable_token_indices must be token ids, found {rows!r}")
    names = settings.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{file}: modules_to_save must be a list of names, found {names!r}")


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: `re.match` of `(.*\\.)?(key)$`, the first hit wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
