"""What a fitted router keeps on disk, in the bundle's folder router/: settings in JSON, numbers in safetensors.

    router.json              the settings, the bundle's digest, and the names of the files below
    weights-HASH.safetensors the classifier, the calibration of distances and the training samples' vectors
    samples-HASH.jsonl       the training samples' texts and fields
    held-HASH.jsonl          the validation samples, and texts that users' feedback made strangers ("none")

Files are named by their content and router.json is written last, so a kill leaves the previous router whole. The
bundle's manifest does not list the folder: fitting a router does not change the bundle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..bundle.files import SCRATCH, write_bytes
from ..bundle.named import ROUTER, has_content, named_by_content
from ..bundle.sealed import ROUTER_KEY, router_digest
from ..bundle.versioned import read_versioned
from ..data.rows import rows_of
from ..engine.base import FloatArray
from ..errors import RouterError
from ..naming import check_expert_name
from .classify import Kind
from .embed import EmbedSettings
from .samples import Sample
from .table import AVERAGE, MIXTURE

FOLDER, RECORD = ROUTER.split("/")
ASSESSMENT = "assessment.json"
# Names by content: of these and of no others is the folder cleared.
WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
SAMPLES = re.compile(r"samples-[0-9a-f]{16}\.jsonl")
HELD = re.compile(r"held-[0-9a-f]{16}\.jsonl")
OWN = re.compile(f"{WEIGHTS.pattern}|{SAMPLES.pattern}|{HELD.pattern}|{SCRATCH.pattern}")


class RouterRecord(BaseModel):
    """router.json.

    Attributes:
        bundle: digest of the bundle that the router was fitted for.
        model: source of the model that embeds; None for the bundle's own average.
        fingerprint: of that model.
        experts: field -> the expert that answers it ("average" is one).
        fallback: "average", an expert's name, or "mixture": the experts weighted by their fields' probability.
        temperature: the classifier's logits are divided by it.
        threshold: of the confidence; under it the fallback answers.
        thresholds: field -> its own, where the assessment says what its expert gains and loses.
        labelled: training samples that somebody labelled, the first of them; 0 is a router fitted without labels, and
            None one of before that was noted, whose samples are all labelled.
        descriptions: field -> the description that the other samples were made of.
        digest: of all the others, which `verify` looks at; None of one of before it was noted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["polymerge-router"] = "polymerge-router"
    format_version: Literal[1, 2, 3] = 3  # 2: the space has axes; 3: the gate has topics
    polymerge_version: str
    bundle: str
    model: str | None
    fingerprint: str
    embed: EmbedSettings
    classifier: Kind
    fields: tuple[str, ...]
    experts: dict[str, str]
    fallback: str
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    threshold: Annotated[float, Field(allow_inf_nan=False)]
    thresholds: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    labelled: int | None = None
    descriptions: dict[str, str] = {}
    weights: Annotated[str, Field(pattern=rf"^({WEIGHTS.pattern})?$")] = ""
    samples: Annotated[str, Field(pattern=rf"^({SAMPLES.pattern})?$")] = ""
    held: Annotated[str, Field(pattern=rf"^({HELD.pattern})?$")] = ""
    digest: str | None = None

    @field_validator("experts", "fallback")
    @classmethod
    def _experts_are_safe(cls, named: dict[str, str] | str) -> dict[str, str] | str:
        for name in [named] if isinstance(named, str) else named.values():
            if name not in (AVERAGE, MIXTURE):
                check_expert_name(name)
        return named

    @model_validator(mode="after")
    def _every_field_has_its_expert(self) -> RouterRecord:
        if not self.fields or sorted(self.fields) != sorted(self.experts):
            raise ValueError("fields and experts are not those of one router")
        return self

    def threshold_of(self, field: str) -> float:
        """The least confidence at which the field's expert answers."""
        return self.thresholds.get(field, self.threshold)


def router_folder(bundle: Path) -> Path:
    """Where a bundle's router lies."""
    return bundle / FOLDER


def assessment_file(bundle: Path) -> Path:
    """Where a bundle keeps the assessment of its own experts, which says which of them answers which field."""
    return router_folder(bundle) / ASSESSMENT


def has_router(bundle: Path) -> bool:
    """Whether a router was fitted. The folder alone does not say so: an assessment may lie in it."""
    return (router_folder(bundle) / RECORD).exists()


def write_record(
    folder: Path,
    record: RouterRecord,
    arrays: Mapping[str, FloatArray],
    samples: Sequence[Sample],
    held: Sequence[Sample],
) -> RouterRecord:
    """Writes a router and removes the files of the one before it, or of one that was never whole.

    Returns the record with the files' names and its digest.
    """
    folder.mkdir(exist_ok=True)
    weights = save(dict(arrays), metadata={"format": "np"})
    named = {
        "weights": _write_named(folder, "weights", ".safetensors", weights),
        "samples": _write_named(folder, "samples", ".jsonl", _lines(samples)),
        "held": _write_named(folder, "held", ".jsonl", _lines(held)) if held else "",
    }
    record = record.model_copy(update=named)
    record = record.model_copy(update={ROUTER_KEY: router_digest(json.loads(record.model_dump_json()))})
    write_bytes(folder / RECORD, (record.model_dump_json(indent=1) + "\n").encode())
    for file in list(folder.iterdir()):
        if OWN.fullmatch(file.name) and file.name not in named.values():
            file.unlink()
    return record


def _lines(samples: Sequence[Sample]) -> bytes:
    rows = (json.dumps({"prompt": s.text, "field": s.field}, ensure_ascii=False) + "\n" for s in samples)
    return "".join(rows).encode()


def _write_named(folder: Path, stem: str, suffix: str, data: bytes) -> str:
    name = named_by_content(stem, suffix, data)
    write_bytes(folder / name, data)
    return name


def read_record(folder: Path) -> RouterRecord:
    """router.json, checked. Raises RouterError where there is none or it is damaged."""
    missing = f"{folder.parent}: no router in this bundle; run `polymerge router fit {folder.parent} --data DIR`"
    fix = "run `polymerge router fit` again"
    return read_versioned(RouterRecord, folder / RECORD, error=RouterError, missing=missing, fix=fix)


def read_arrays(folder: Path, record: RouterRecord) -> dict[str, FloatArray]:
    """The numbers, whole and unchanged. Raises RouterError otherwise."""
    data = _read_named(folder, record.weights)
    try:
        arrays: dict[str, FloatArray] = load(data)
        return arrays
    except SafetensorError as error:
        raise RouterError(f"{folder / record.weights}: {error}; run `polymerge router fit` again") from None


def read_texts(folder: Path, name: str) -> list[Sample]:
    """The samples of a file that the record names. Raises RouterError where it is missing or changed."""
    lines = _read_named(folder, name).split(b"\n")
    return [Sample(row["prompt"], row["field"]) for _, row in rows_of(lines, folder / name)]


def _read_named(folder: Path, name: str) -> bytes:
    file = folder / name
    try:
        data = file.read_bytes()
    except OSError:
        raise RouterError(f"{file}: missing; run `polymerge router fit` again") from None
    if not has_content(name, data):
        raise RouterError(f"{file}: its content is not what its name says; run `polymerge router fit` again")
    return data
