"""What people ask language models all day: texts of many topics that stand for requests of no field.

A router that has seen none but its own fields' samples cannot know what else there is, least of all with two fields or
one. So it learns from strangers too (outlier exposure, Hendrycks et al. 2019, arXiv 1812.04606). The texts are the
package's own, in background.txt: a line `# topic` and the texts below it. A topic that is one of the router's own
fields is left out by the fit (`polymerge.router.outside`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .samples import Sample

FILE = Path(__file__).with_name("background.txt")


@cache
def background() -> tuple[Sample, ...]:
    """The texts, with their topic in the place of a field."""
    return by_topic(FILE)


def by_topic(file: Path) -> tuple[Sample, ...]:
    """The texts of such a file."""
    texts, topic = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            topic = line.removeprefix("# ")
        elif line:
            texts.append(Sample(line, topic))
    return tuple(texts)
