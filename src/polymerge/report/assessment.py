"""The report's sections of an assessment: accuracy of every candidate on every field, what each costs, the proposal.

Knows how to draw an assessment's plain data (`polymerge.assess.Assessment.to_json`), and where a bundle keeps its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..assess.results import FORMAT
from ..bundle.bundle import Bundle
from ..errors import BundleError
from ..router.record import assessment_file
from .blocks import cards, plot, plotly, section, size, table, write_page


def write_assessment(assessment: Mapping[str, Any], path: Path) -> Path:
    """A page about an assessment alone.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    proposal = (assessment.get("proposal") or {}).get("chosen")
    top = (
        cards(
            [
                (f"{proposal['accuracy']:.1%}", "mean of each field's best accuracy in the proposed set"),
                (size(proposal["bytes"]), "it needs in memory"),
                (str(len(proposal["experts"])), "experts: " + ", ".join(proposal["experts"])),
            ]
        )
        if proposal
        else ""
    )
    body = top + "".join(assessment_sections(assessment))
    return write_page(path, "Assessment", body, f"polymerge {assessment['polymerge_version']}")


def bundle_sections(bundle: Bundle) -> list[str]:
    """The sections of the assessment that lies inside a bundle; none where there is none.

    Raises:
        BundleError: it is not an assessment.
    """
    file = assessment_file(bundle.path)
    if not file.exists():
        return []
    try:
        assessment = json.loads(file.read_text(encoding="utf-8"))
        if assessment["format"] != FORMAT:
            raise KeyError
        return assessment_sections(assessment)
    except (OSError, ValueError, KeyError, TypeError):
        raise BundleError(f"{file}: not an assessment; make it again with `polymerge assess {bundle.path}`") from None


def assessment_sections(assessment: Mapping[str, Any]) -> list[str]:
    """Heatmap, table and, where there is one, the proposal."""
    models = {**assessment["candidates"], **assessment["thinkers"]}
    sections = [_heatmap(assessment, models), _costs(models)]
    return sections + ([_proposal(assessment["proposal"])] if assessment["proposal"] else [])


def _heatmap(assessment: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    go = plotly()
    fields = list(assessment["fields"])
    names = [name for name, model in models.items() if model["accuracy"]]
    grid = [[models[name]["accuracy"].get(field) for field in fields] for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            x=[escape(field) for field in fields],
            y=[escape(name) for name in names],
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            colorscale="Viridis",
            colorbar={"tickformat": ".0%", "title": "accuracy"},
            text=[["" if value is None else f"{value:.1%}" for value in row] for row in grid],
            texttemplate="%{text}",
            hovertemplate="%{y} on %{x}: %{z:.1%}<extra></extra>",
        )
    )
    figure.update_layout(yaxis={"autorange": "reversed"})
    text = "The assessment of every model on every field. What could not be measured is left white."
    return section("Accuracy by field", text, plot(figure, 170 + 34 * len(names)))


def _costs(models: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            name,
            size(model["peak_memory"]) if model["peak_memory"] else "-",
            f"{model['tokens_per_second']:.0f}" if model["tokens_per_second"] else "-",
            "; ".join(f"{field or 'all'}: {reason}" for field, reason in model["failed"].items()) or "-",
            model["source"],
        )
        for name, model in models.items()
    ]
    text = "Peak memory is the GPU allocator's where there is a GPU, and the whole process's otherwise."
    head = ("model", "peak memory", "tokens a second", "not measured", "source")
    return section("What the models cost", text, table(head, rows, last_is_source=True))


def _proposal(proposals: Mapping[str, Any]) -> str:
    rows = []
    for role in ("chosen", "runner_up", "unlimited"):
        proposal = proposals[role]
        if proposal:
            label = {"chosen": "proposed", "runner_up": "runner-up", "unlimited": "without the limit"}[role]
            rows.append((label, proposal["label"], f"{proposal['accuracy']:.1%}", size(proposal["bytes"])))
    text = proposals["why"][:1].upper() + proposals["why"][1:] + "."
    return section("Proposal", text, table(("", "models", "accuracy", "memory"), rows))
