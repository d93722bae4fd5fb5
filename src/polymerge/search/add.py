"""One more expert for a bundle, weighted by what its texts show where there are some.

Knows the order alone: what is added how is `polymerge.merging.grow`'s, what is seen `polymerge.search.calibrate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..merging import grow
from ..merging.grow import Added
from ..paths import path_of
from ..recipe.lines import as_source
from ..recipe.source import Source
from .calibrate import Original, calibrated_alone


def add_expert(
    bundle: Bundle | str | Path,
    name: str,
    source: Source | Mapping[str, Any] | str | Path,
    *,
    base: str | None = None,
    calibration: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Added:
    """Adds an expert against the bundle's base as it stands.

    Args:
        base: the model under a PEFT adapter; by default the one that the adapter's own configuration names.
        calibration: JSONL file of its requests: what counts for these of its residuals is kept first.
        progress: called with (tensors done, tensors in all, tensor) after every tensor.

    Raises:
        RecipeError: an unsafe name. BundleError: the name is taken. SourceError: the checkpoint does not fit.
        LockedError: another process is writing to the bundle. DataError, ModelError: of the calibration.
    """
    calibrate = None
    if calibration is not None:
        found = as_source(source, name)
        found = found.model_copy(update={"base": base}) if base else found
        original = Original(name, found, device, trust_remote_code, Bundle.open(bundle).manifest.method.seed)
        calibrate = partial(calibrated_alone, original, str(path_of(calibration, "calibration")))
    return grow.add_expert(
        bundle, name, source, base=base, device=device, trust_remote_code=trust_remote_code, progress=progress,
        calibrate=calibrate,
    )  # fmt: skip
