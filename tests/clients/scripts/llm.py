"""Simon Willison's `llm`: a prompt, a schema and a tool, by its own settings file."""

import json
import os
import pathlib
import sys

sys.path.pop(0)

import llm

folder = pathlib.Path(os.environ["HOME"])
os.environ["LLM_USER_PATH"] = str(folder)
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: poly\n  model_name: average\n  api_base: {sys.argv[1]}\n"
    "  supports_schema: true\n  supports_tools: true\n"
)
model = llm.get_model("poly")
model.key = "none"
assert isinstance(model.prompt("Hello?", max_tokens=8).text(), str)
schema = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"], "additionalProperties": False}
assert json.loads(model.prompt("An order.", schema=schema, max_tokens=1000).text())["sum"] in (1, 2)
assert json.loads(model.prompt("An order.", schema=schema, stream=False, max_tokens=1000).text())["sum"] in (1, 2)


def pay(amount: int) -> str:
    """Pays."""
    return "paid"


model.prompt("Pay.", tools=[pay], max_tokens=8).text()
