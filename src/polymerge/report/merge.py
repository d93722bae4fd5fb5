"""The report's plots of the merge, and what is folded under them: sizes, experts, errors, energy and ranks.

Knows how to draw them; every number comes from `polymerge.bundle.inspect`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..bundle.inspect import Inspection
from ..bundle.stats import energy_kept, module_kind
from ..bundle.verdict import AS_BEFORE
from ..recipe.rates import layer_number
from .blocks import COLOURS, mean, paragraph, plot, plotly, section, size, table


def merge_plots(inspection: Inspection, stats: Sequence[Mapping[str, Any]]) -> list[str]:
    """What everybody sees: bytes, what each expert kept, errors by layer; without statistics only the bytes."""
    return [_sizes(inspection), *([_kinds(stats), _errors(stats)] if stats else [])]


def merge_folds(inspection: Inspection, stats: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Title -> what is there for those who ask."""
    folds = {"Every expert in figures": _experts(inspection)}
    if stats:
        folds |= {
            "Energy kept by layer and kind of module": _energy(stats),
            "Rank by kind of module": _ranks(stats),
            "Tensors that lost most": _worst(inspection),
        }
    return folds


def _kinds(stats: Sequence[Mapping[str, Any]]) -> str:
    """Bars of energy kept, a group for every kind of module and a bar for every expert."""
    go, figure = plotly(), plotly().Figure()
    kinds = sorted({module_kind(line["module"]) for line in stats})
    experts = list(dict.fromkeys(line["expert"] for line in stats))
    for expert, colour in zip(experts, COLOURS * len(experts), strict=False):
        lines = [line for line in stats if line["expert"] == expert]
        shares = [energy_kept([x for x in lines if module_kind(x["module"]) == kind]) for kind in kinds]
        figure.add_trace(go.Bar(x=kinds, y=shares, name=escape(expert), marker_color=colour))
    figure.update_layout(barmode="group", yaxis={"title": "energy kept", "tickformat": ".0%", "range": [0, 1]})
    text = f"From {AS_BEFORE:.0%} on an expert is taken to answer as before. Where bars are short, rank is."
    return section("What each expert kept", text, plot(figure, 300))


def _sizes(inspection: Inspection) -> str:
    go = plotly()
    residuals = sum(e.residual_bytes for e in inspection.experts)
    own_bytes = sum(e.bytes for e in inspection.experts) - residuals
    figure = go.Figure()
    labels = ["separate models", "one model", "this bundle"]
    one = inspection.base_bytes
    parts = {
        "whole models": [inspection.separate_bytes, one, 0],
        "average": [0, 0, one],
        "residuals": [0, 0, residuals],
        "experts' own tensors": [0, 0, own_bytes],
    }
    for (part, values), colour in zip(parts.items(), ("#b9c2cf", *COLOURS), strict=False):
        texts = [size(v) if v else "" for v in values]
        figure.add_bar(
            y=labels,
            x=[v / 1e6 for v in values],
            name=part,
            orientation="h",
            marker_color=colour,
            customdata=texts,
            hovertemplate="%{customdata}<extra>" + part + "</extra>",
        )
    figure.update_layout(barmode="stack", xaxis_title="MB", yaxis={"autorange": "reversed"})
    return section("Size", f"Bytes of weights on disk.{_loaded(inspection)}", plot(figure, 260))


def _loaded(inspection: Inspection) -> str:
    """What memory has to say of a bundle whose residuals are coded, or whose base is stored in fewer bits."""
    more = []
    if inspection.base_code != inspection.dtype:
        more.append(f"the base, stored in {inspection.base_code}, where it is loaded in 16 bits")
    if inspection.coded:
        more.append(f"the residuals: those of {inspection.code} are decoded when they are loaded")
    if not more:
        return " A loaded bundle holds as much in memory."
    return f" In memory more is taken by {', and by '.join(more)}."


def _experts(inspection: Inspection) -> str:
    head = (
        "expert",
        "size",
        "own tensors",
        "scale ratio",
        "energy kept",
        "error",
        "error of the average alone",
        "source",
    )
    rows = [
        (
            e.name,
            size(e.bytes),
            str(e.own_tensors),
            f"1 ± {max(abs(ratio - 1) for ratio in e.scale_ratio_range):.1g}",
            f"{e.energy_kept:.1%}",
            f"{e.relative_error:.2g}",
            f"{e.lost_by_averaging:.2g}",
            e.source,
        )
        for e in inspection.experts
    ]
    text = "Errors are relative Frobenius norms over all compressed tensors of an expert."
    return paragraph(text) + table(head, rows, last_is_source=True)


def _errors(stats: Sequence[Mapping[str, Any]]) -> str:
    """Per layer, what averaging loses and what is left after the residuals."""
    go = plotly()
    figure = go.Figure()
    experts = list(dict.fromkeys(line["expert"] for line in stats))
    for expert, colour in zip(experts, COLOURS * len(experts), strict=False):
        lines = [line for line in stats if line["expert"] == expert]
        numbers = sorted({layer_number(line["module"]) for line in lines if layer_number(line["module"]) >= 0})
        for key, dash, label in (("residual_norm", "dot", "average alone"), ("relative_error", "solid", "bundle")):
            means = [mean([x[key] for x in lines if layer_number(x["module"]) == n]) for n in numbers]
            figure.add_scatter(
                x=numbers,
                y=means,
                name=f"{expert}, {label}",
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"size": 5},
            )
    figure.update_layout(xaxis_title="layer", yaxis_title="relative error", yaxis={"rangemode": "tozero"})
    text = "Mean relative error of a layer's weights: dotted with nothing but the average, solid with the residual."
    return section("Error by layer", text, plot(figure, 380))


def _energy(stats: Sequence[Mapping[str, Any]]) -> str:
    """A heatmap of layer by module kind for every expert."""
    go = plotly()
    kinds = sorted({module_kind(line["module"]) for line in stats})
    numbers = sorted({layer_number(line["module"]) for line in stats})
    plots = []
    for expert in dict.fromkeys(line["expert"] for line in stats):
        cells: dict[tuple[str, int], list[float]] = {}
        for line in (line for line in stats if line["expert"] == expert):
            cells.setdefault((module_kind(line["module"]), layer_number(line["module"])), []).append(
                line["energy_kept"]
            )
        grid = [[mean(cells.get((kind, n), [])) for n in numbers] for kind in kinds]
        figure = go.Figure(
            go.Heatmap(
                z=grid,
                x=numbers,
                y=kinds,
                zmin=0,
                zmax=1,
                colorscale="Viridis",
                colorbar={"tickformat": ".0%", "title": "kept"},
                hovertemplate="layer %{x}, %{y}: %{z:.1%}<extra></extra>",
            )
        )
        figure.update_layout(title={"text": escape(expert), "font": {"size": 15}}, xaxis_title="layer")
        plots.append(plot(figure, 150 + 26 * len(kinds)))
    text = "Share of a residual's squared norm that its factors keep. A higher rank would help most where it is dark."
    return paragraph(text) + "".join(plots)


def _ranks(stats: Sequence[Mapping[str, Any]]) -> str:
    go = plotly()
    by_kind: dict[str, dict[str, Any]] = {}
    for line in stats:
        by_kind.setdefault(module_kind(line["module"]), dict(line))
    kinds = sorted(by_kind)
    figure = go.Figure(
        go.Bar(
            x=kinds,
            y=[by_kind[kind]["rank"] for kind in kinds],
            marker_color=COLOURS[0],
            customdata=["{} x {}".format(*by_kind[kind]["shape"]) for kind in kinds],
            hovertemplate="%{x} (%{customdata}): rank %{y}<extra></extra>",
        )
    )
    figure.update_layout(yaxis_title="rank")
    text = "Rank 0 means that the experts' matrices are kept whole, or that the average alone is."
    return paragraph(text) + plot(figure, 300)


def _worst(inspection: Inspection) -> str:
    head = ("tensor", "expert", "shape", "rank", "error", "energy kept")
    rows = [
        (
            line["tensor"],
            line["expert"],
            "{} x {}".format(*line["shape"]),
            str(line["rank"]),
            f"{line['relative_error']:.3g}",
            f"{line['energy_kept']:.1%}",
        )
        for line in inspection.worst
    ]
    return paragraph("By relative error of the rebuilt weight.") + table(head, rows)
