"""The bundle's HTML report: one file with tables and plots that needs no network.

Knows which sections a page has and their order; every section is drawn by a module of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.files import write_bytes
from ..bundle.inspect import Inspection, inspect_bundle
from ..recipe.rates import in_words
from . import assessment
from .blocks import cards, html_page, size
from .demo import demo_section
from .merge import merge_sections
from .router import router_sections


def write_report(bundle: Bundle | str | Path, path: str | Path, *, demo: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Writes the report.

    Args:
        demo: rows of a demo (`polymerge.demo.run.SkillRow` as dicts), shown first.

    Raises:
        BundleError: not a bundle, or one with an unusable assessment. MissingExtraError: plotly is not installed.
    """
    bundle, path = Bundle.open(bundle), Path(path)
    inspection = inspect_bundle(bundle)
    sections = [demo_section(demo)] if demo else []
    sections += [*router_sections(bundle.path), *merge_sections(inspection, bundle.stats())]
    sections += assessment.bundle_sections(bundle)
    write_bytes(path, _page(bundle, inspection, sections).encode())
    return path


def _page(bundle: Bundle, inspection: Inspection, sections: Sequence[str]) -> str:
    low, high = inspection.rank_range
    top = cards(
        [
            (size(inspection.total_bytes), f"for {len(inspection.experts)} experts"),
            (f"{inspection.share_of_one_model:.2f} ×", f"one model; apart they are {size(inspection.separate_bytes)}"),
            (f"{inspection.energy_kept:.1%}", "of the residuals' energy kept"),
            (in_words(inspection.compress_rate), f"compress rate, rank {low} to {high}"),
            (inspection.scale.replace("_", " "), "scale"),
        ]
    )
    notes = "".join(f"<p>Note: {escape(note)}</p>" for note in inspection.notes)
    kind = f"{escape(inspection.architecture)}, stored in {escape(inspection.dtype)}"
    intro = f"<p>{len(inspection.experts)} experts of {kind}.</p>"
    footer = f"polymerge {bundle.manifest.polymerge_version}, bundle {bundle.digest[:16]}"
    return html_page(bundle.path.resolve().name, f"{intro}{top}{notes}{''.join(sections)}", footer)
