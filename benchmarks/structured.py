"""Answers held to the schemas of a public suite, judged by the `jsonschema` package.

    git clone https://github.com/json-schema-org/JSON-Schema-Test-Suite
    python benchmarks/structured.py bundle JSON-Schema-Test-Suite/tests/draft2020-12

Takes a folder of JSON files: the suite's (lists of {schema, tests}), MaskBench's ({schema, tests}) or plain schemas.
Every schema is asked of a bundle's expert once, all in running batches, greedily or drawn. Counted: schemas that are
refused and why, answers that `max_tokens` cut, and those that are whole, which must be valid.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from polymerge.engine.base import GenerateRequest, Generation
from polymerge.engine.local.engine import HFEngine
from polymerge.engine.structure import Structure, json_structure
from polymerge.errors import ModelError

PROMPT = "Write one short JSON value.\n"


def main() -> None:
    """Prints the table and, with --json, writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--expert", default=None, help="by default the average")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--limit", type=int, default=None, help="only so many schemas that are not refused")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    given = parser.parse_args()
    engine = HFEngine.from_bundle(given.bundle)
    schemas, refused = compiled(engine, list(schemas_of(given.folder)), given.expert)
    schemas = schemas[: given.limit]
    asked = [
        GenerateRequest(PROMPT, given.expert, given.max_tokens, given.temperature, seed=n, structure=structure_of(s))
        for n, (_, s) in enumerate(schemas)
    ]
    began = time.monotonic()
    answers = engine.generate(asked)
    seconds = time.monotonic() - began
    found = Counter(judged(answer, schema) for answer, (_, schema) in zip(answers, schemas, strict=True))
    figures = {
        "schemas": len(schemas) + sum(refused.values()),
        "refused": dict(refused.most_common()),
        "asked": len(schemas),
        "seconds": round(seconds, 1),
        "tokens": sum(answer.tokens for answer in answers),
        **found,
    }
    print(f"{figures['schemas']} schemas, {sum(refused.values())} refused, {len(schemas)} asked: {dict(found)}")
    for reason, count in refused.most_common(12):
        print(f"  {count:4}  {reason}")
    for answer, (place, schema) in zip(answers, schemas, strict=True):
        if judged(answer, schema) == "invalid":
            print(f"invalid: {place}: {json.dumps(schema)[:200]}: {answer.text[:200]!r}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


def schemas_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """(place, schema) of every file."""
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        for number, case in enumerate(data if isinstance(data, list) else [data]):
            yield f"{file.name}:{number}", case.get("schema", case)


def structure_of(schema: Any) -> Structure:
    """As the server makes it of a request."""
    return json_structure(schema, "schema")


def compiled(
    engine: HFEngine, schemas: list[tuple[str, Any]], expert: Any
) -> tuple[list[tuple[str, Any]], Counter[str]]:
    """The schemas that can be held, and why the others are refused."""
    held, refused, voice = [], Counter[str](), engine.voices.of(expert)
    for place, schema in schemas:
        try:
            engine.grammars.matcher(structure_of(schema), voice)
        except ModelError as error:
            refused[str(error)[:100]] += 1
        else:
            held.append((place, schema))
    return held, refused


def judged(answer: Generation, schema: Any) -> str:
    """Whether an answer is cut, valid or invalid, or the judge cannot read the schema (patterns that Python lacks)."""
    if answer.finish == "length":
        return "cut"
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(answer.text))
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    except Exception:  # the judge's own: a pattern with \\p, a reference that it would have to fetch
        return "not judged"
    return "valid"


if __name__ == "__main__":
    main()
