"""Which adapter a request wants applied, as llama.cpp numbers them: in the order in which they were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def applied_adapter(adapters: Sequence[str], name: str | None) -> list[dict[str, Any]]:
    """One at scale 1 and every other at 0; all at 0 for None. A request that lists none would get the server's own
    scales."""
    return [{"id": number, "scale": float(adapter == name)} for number, adapter in enumerate(adapters)]
