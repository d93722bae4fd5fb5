"""Under which licence an expert's source stands: what the model card beside it says.

Knows cards of folders and of the hub. What says nothing is said to say nothing; nothing is guessed.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from ..bundle.manifest import ExpertRecord
from ..paths import here
from ..sources.hub import hub_answers
from ..sources.opening import HUB_ID


def licence_of(record: ExpertRecord) -> str | None:
    """The source's licence as its card names it, or its base's; None where no card can be read, or none names one."""
    for source in (record.source, record.base):
        licence = _of_source(source) if source else None
        if licence:
            return licence
    return None


def _of_source(source: str) -> str | None:
    folder = here(source)
    if folder and folder.is_dir():
        return _of_card(folder / "README.md")
    repo = source.partition("@")[0]
    return _of_hub(repo) if HUB_ID.fullmatch(repo) and hub_answers() else None


def _of_card(card: Path) -> str | None:
    try:
        text = card.read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def _of_hub(repo: str) -> str | None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = HfApi(endpoint=constants.ENDPOINT).model_info(repo).card_data
    except (HfHubHTTPError, OSError, ValueError):
        return None
    licence = card.get("license") if card else None
    return licence if isinstance(licence, str) else None
