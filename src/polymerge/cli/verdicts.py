"""What a merge left of every expert, in words: after `polymerge merge` and in `polymerge inspect`.

Measured where there were held-out requests, otherwise predicted from the energy kept, and said to be. Knows how it is
printed; thresholds of a prediction are `polymerge.bundle.verdict`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bundle.inspect import Inspection
    from ..search.agreement import Agreement

# What a bundle promises of every expert: this share of its accuracy, and of its likeliest tokens.
KEPT, TOP1 = 0.99, 0.98
# No expert that was measured with less KL than this had fewer of its likeliest tokens (docs/codes.md).
TOP1_KL = 0.005


def print_verdicts(inspection: Inspection) -> None:
    """A line an expert: what is predicted."""
    from .console import tell

    for expert in inspection.experts:
        tell(f"{expert.name}: {expert.verdict.words}")
    tell("(predicted from the energy kept; held-out requests measure it: merge --prompts NAME=FILE.jsonl)")


def print_measured(measured: Mapping[str, Agreement], words: str) -> None:
    """A line an expert: what was measured; and the command that finds what keeps them all, where one falls short.

    Args:
        words: the command of the merge.
    """
    from .console import say, tell

    for name, agreement in measured.items():
        kept = "" if agreement.kept is None else f"keeps {agreement.kept:.1%} of its accuracy, "
        tell(f"{name}: {kept}the same likeliest token at {agreement.top1:.1%}, KL {agreement.kl:.2g}")
    right = [name for name, a in measured.items() if a.kept is not None and a.kept < KEPT]
    likeliest = [name for name, a in measured.items() if a.top1 < TOP1]
    if right:
        tell(f"{' and '.join(right)}: less than {KEPT:.0%} of the accuracy is kept")
    if likeliest:
        tell(f"{' and '.join(likeliest)}: less than {TOP1:.0%} of the likeliest tokens are the same")
    if right or likeliest:
        asked = right and all(a.kept is not None for a in measured.values())  # of an expert never right it is no target
        target = f"accuracy={KEPT:.0%}" if asked else f"kl={TOP1_KL:g}"
        tell("this finds what keeps more, and replaces the bundle:")
        say(f"  {words} --target {target} --overwrite")
