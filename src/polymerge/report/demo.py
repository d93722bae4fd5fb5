"""The report's table of a demo: what each expert keeps. Every number comes from the demo itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import section, table


def demo_section(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (
        "skill",
        "examples",
        "original expert",
        "plain average",
        "bundle, right expert",
        "kept",
        "KL average",
        "KL bundle",
    )
    body = [
        (
            row["skill"],
            str(row["examples"]),
            f"{row['original']:.1%}",
            f"{row['average']:.1%}",
            f"{row['bundle']:.1%}",
            f"{row['kept']:.1%}",
            f"{row['kl_average']:.4f}",
            f"{row['kl_bundle']:.4f}",
        )
        for row in rows
    ]
    text = (
        "Exact match on held-out requests. KL is from the original expert's next-token distribution, in nats a token."
    )
    return section("What the experts keep", text, table(head, body))
