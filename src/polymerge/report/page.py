"""The bundle's HTML report: words first, three plots, and all else folded. It needs no network.

Knows which sections a page has and their order; every section is drawn by a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.inspect import Inspection, inspect_bundle
from ..bundle.place import file_to_write
from ..recipe.rates import in_words
from . import assessment
from .answers import measured_answers, predicted_answers
from .blocks import cards, fold, size, write_page
from .demo import demo_section
from .merge import merge_folds, merge_plots
from .router import router_sections


def write_report(bundle: Bundle | str | Path, path: str | Path, *, demo: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Writes the report, and beside it the script that draws its plots.

    Args:
        demo: rows of a demo (`polymerge.demo.run.SkillRow` as dicts): what was measured then goes before what is
            predicted.

    Raises:
        BundleError: not a bundle, or one with an unusable assessment. MissingExtraError: plotly is not installed.
        OutputExistsError: no page can be written there.
    """
    bundle, path = Bundle.open(bundle), file_to_write(path, "html")
    inspection, stats = inspect_bundle(bundle), bundle.stats()
    body = [_top(inspection), measured_answers(demo) if demo else predicted_answers(inspection)]
    body += [demo_section(demo)] * bool(demo)
    body += merge_plots(inspection, stats)
    folded = {"Predicted from the energy kept": predicted_answers(inspection)} if demo else {}
    folded |= merge_folds(inspection, stats)
    folded |= _optional("The router", router_sections(bundle.path))
    folded |= _optional("The assessment", assessment.bundle_sections(bundle))
    folded |= _optional("Notes", [f"<p>{escape(note)}</p>" for note in inspection.notes])
    body += [fold(title, content) for title, content in folded.items()]
    footer = f"polymerge {bundle.manifest.polymerge_version}, bundle {bundle.digest[:16]}"
    return write_page(path, bundle.path.resolve().name, "".join(body), footer)


def _optional(title: str, parts: Sequence[str]) -> dict[str, str]:
    return {title: "".join(parts)} if parts else {}


def _top(inspection: Inspection) -> str:
    low, high = inspection.rank_range
    top = cards(
        [
            (size(inspection.total_bytes), f"for {len(inspection.experts)} experts"),
            (f"{inspection.share_of_one_model:.2f} ×", f"one model; apart they are {size(inspection.separate_bytes)}"),
            (f"{inspection.energy_kept:.1%}", "of the residuals' energy kept"),
            (in_words(inspection.compress_rate), f"compress rate, code {inspection.code}, rank {low} to {high}"),
        ]
    )
    kind = f"{escape(inspection.architecture)}, stored in {escape(inspection.dtype)}"
    return f"<p>{len(inspection.experts)} experts of {kind}.</p>{top}"
