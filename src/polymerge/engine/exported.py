"""What the folders of exports have in common: how an expert must answer there, and what it has beside its weights.

Knows probes and personas. Does not know a runtime's files or how it is run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator

from ..errors import ModelError
from ..naming import check_path
from ..sources.persona import Group, Persona, read_persona

logger = logging.getLogger(__name__)

# A served model may be so far from its reference, in nats a token: bfloat16 rounds these by some hundredths.
PROBE_TOLERANCE = 0.05
# And no further than this share of the way from the average to the expert.
PROBE_SHARE = 0.25
# The name under which the base is served.
AVERAGE = "average"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Probe(Strict):
    """What a served expert must answer: tokens, and the log-probability (nats) of each but the first.

    Attributes:
        ids: T token ids.
        expert, average: T - 1 log-probabilities under the exported expert and under the average.
    """

    ids: tuple[int, ...]
    expert: tuple[float, ...]
    average: tuple[float, ...]


class ExportedExpert(Strict):
    """One expert as a runtime serves it, and what the export cost it.

    Attributes:
        adapter: its file or folder, relative to the export's folder.
        kl: mean KL(bundle's expert || average with the exported factors) over the calibration tokens, nats a token.
        kl_unfolded: the same for the bundle's own factors alone, with nothing folded into them.
        kl_average: the same for the average alone.
        same_token: share of calibration tokens at which both have the same likeliest token.
        persona: in what it is not the average beside its weights: files beside its adapter, which runtimes do not look
            at. Whoever renders a conversation, or sets a request's defaults, must.
    """

    adapter: str
    kl: float
    kl_unfolded: float
    kl_average: float
    same_token: float
    probe: Probe
    persona: tuple[Group, ...] = ()

    @field_validator("adapter")
    @classmethod
    def _stays_inside(cls, adapter: str) -> str:
        check_path(adapter)
        return adapter


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two rows of log-probabilities, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(len(one), 1)


def check_probe(
    expert: str, probe: Probe, logprobs: Sequence[float], *, where: str, runtime: str, folder: Path,
    tolerance: float = PROBE_TOLERANCE,
) -> None:  # fmt: skip
    """Holds a served expert against the export's reference.

    Args:
        logprobs: of the probe's tokens but the first, as served.
        where, runtime: the server's address and what it is, for errors.

    Raises:
        ModelError: it answers like the average, or otherwise.
    """
    apart = distance(probe.expert, probe.average)
    off, from_average = distance(logprobs, probe.expert), distance(logprobs, probe.average)
    if apart <= tolerance:
        logger.warning("expert %r answers its probe like the average (%.2g nats); it tells little", expert, apart)
    if off <= max(tolerance, PROBE_SHARE * apart):
        return
    if from_average <= max(tolerance, PROBE_SHARE * apart):
        raise ModelError(
            f"{where}: expert {expert!r} answers like the average; {runtime} ignores its adapter "
            f"({from_average:.2g} nats from the average, {off:.2g} from the exported expert)"
        )
    raise ModelError(
        f"{where}: expert {expert!r} is {off:.2g} nats a token from the exported one; does the server run {folder}?"
    )


def check_average(
    probe: Probe, logprobs: Sequence[float], *, where: str, fix: str, tolerance: float = PROBE_TOLERANCE
) -> None:
    """The same for the served average. Raises ModelError with what may mend it."""
    off = distance(logprobs, probe.average)
    if off > max(tolerance, PROBE_SHARE * distance(probe.expert, probe.average)):
        raise ModelError(f"{where}: the average is {off:.2g} nats a token from the exported one; {fix}")


def persona_beside(folder: Path, groups: Sequence[Group], average: Persona) -> tuple[Persona, tuple[Group, ...]]:
    """An expert's persona of the files beside its adapter, and in which groups it is not the average's. Raises
    SourceError for a broken file."""
    if not groups:
        return average, ()
    beside = read_persona(folder, average.config)
    templates = beside.templates if "template" in groups else average.templates
    generation = beside.generation if "generation" in groups else average.generation
    return replace(average, templates=templates, generation=generation), tuple(groups)
