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
    found = inspect_bundle(bundle)
    sections = [demo_section(demo)] if demo else []
    sections += [*router_sections(bundle.path), *merge_sections(found, bundle.stats())]
    sections += assessment.bundle_sections(bundle)
    write_bytes(path, _page(bundle, found, sections).encode())
    return path


def _page(bundle: Bundle, found: Inspection, sections: Sequence[str]) -> str:
    top = cards(
        [
            (size(found.total_bytes), f"for {len(found.experts)} experts"),
            (f"{found.share_of_one_model:.2f} ×", f"one model; apart they are {size(found.separate_bytes)}"),
            (f"{found.energy_kept:.1%}", "of the residuals' energy kept"),
            (f"{found.compress_rate:g}", f"compress rate, rank {found.rank_range[0]} to {found.rank_range[1]}"),
            (found.scale.replace("_", " "), "scale"),
        ]
    )
    notes = "".join(f"<p>Note: {escape(note)}</p>" for note in found.notes)
    intro = f"<p>{len(found.experts)} experts of {escape(found.architecture)}, stored in {escape(found.dtype)}.</p>"
    footer = f"polymerge {bundle.manifest.polymerge_version}, bundle {bundle.digest[:16]}"
    return html_page(bundle.path.resolve().name, f"{intro}{top}{notes}{''.join(sections)}", footer)
