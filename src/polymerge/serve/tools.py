"""Tools that a request offers, and which of them the answer may or must call.

Knows OpenAI's fields. How a model writes a call is `polymerge.serve.calling`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .strict import Strict

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class Function(Strict):
    """What may be called. Its arguments are held to `parameters` whether `strict` or not."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function

    @property
    def for_template(self) -> dict[str, Any]:
        """As transformers' chat templates know it."""
        function = self.function.model_dump(exclude={"strict"}, exclude_none=True)
        return {"type": "function", "function": function | {"parameters": self.parameters}}

    @property
    def parameters(self) -> dict[str, Any]:
        """The schema of its arguments, which are an object; without one it takes none."""
        given = self.function.parameters
        if not given:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return given if "type" in given else {"type": "object", "properties": {}, **given}


class FunctionChoice(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: FunctionChoice


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class Tooled(Strict):
    """A request that may offer tools."""

    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _offers_what_it_chooses(self) -> Tooled:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required, but tools is empty")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return self.tools or []

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)
