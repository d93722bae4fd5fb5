"""What a request may ask of its answer's form: OpenAI's `response_format`, and vLLM's fields, the older and the newer.

Knows these fields; how an answer is held to a form is the engine's (`polymerge.engine.structure`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ..engine.structure import Structure, choice_structure, json_object, json_structure
from .closing import closed
from .strict import Harmless, Nothing, Strict

Schema = dict[str, Any] | str | bool
Choices = Annotated[list[str], Field(min_length=1)]


class JsonSchema(Strict):
    """A named schema. It is held to whether `strict` or not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True)

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('json_schema: missing; write {"name": ..., "schema": {...}}')
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema: goes with the type json_schema, and the type is {self.type}")
        return self

    @property
    def structure(self) -> Structure | None:
        if self.json_schema is not None:
            return json_structure(closed(self.json_schema.schema_), "response_format")
        return json_object("response_format") if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """vLLM's newer way to say it. Wishes about how the engine does it are not taken."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Nothing = None


class Structured(Strict):
    """A request whose answer may have a form."""

    response_format: ResponseFormat | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_decoding_backend: Harmless = None
    guided_whitespace_pattern: Nothing = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Structured:
        asked = [structure.name for structure in self._structures()]
        if len(asked) > 1:
            raise ValueError(f"{asked[1]}: not together with {asked[0]}; an answer has one form")
        return self

    @property
    def structure(self) -> Structure | None:
        """The form of the answer; None where any will do."""
        return next(iter(self._structures()), None)

    def _structures(self) -> list[Structure]:
        given = self.structured_outputs or StructuredOutputs()
        ways = [
            (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, None, "guided_{}"),
            (given.json_, given.regex, given.choice, given.grammar, given.json_object, "structured_outputs.{}"),
        ]
        asked = [self.response_format.structure if self.response_format else None]
        for schema, regex, choice, grammar, anything, name in ways:
            asked += [
                json_structure(schema, name.format("json")) if schema is not None else None,
                Structure("regex", regex, name.format("regex")) if regex is not None else None,
                choice_structure(choice, name.format("choice")) if choice is not None else None,
                Structure("grammar", grammar, name.format("grammar")) if grammar is not None else None,
                json_object(name.format("json_object")) if anything else None,
            ]
        return [structure for structure in asked if structure is not None]
