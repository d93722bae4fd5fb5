"""AutoGen's agent with a tool, with its defaults."""

import asyncio
import json
import sys
from typing import Literal

sys.path.pop(0)

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelFamily, UserMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel


class Order(BaseModel):
    item: Literal["stamp", "pen"]


async def pay(amount: int) -> str:
    """Pays."""
    return "paid"


async def main() -> None:
    info = {"vision": False, "function_calling": True, "json_output": True, "family": ModelFamily.UNKNOWN,
            "structured_output": True}  # fmt: skip
    client = OpenAIChatCompletionClient(
        model="average", base_url=sys.argv[1], api_key="none", model_info=info, max_tokens=1000
    )
    done = await AssistantAgent("clerk", client, tools=[pay]).run(task="Pay.")
    assert done.messages
    answer = await client.create([UserMessage(content="An order.", source="user")], json_output=Order)
    assert json.loads(answer.content)["item"] in ("stamp", "pen")
    tools = AssistantAgent("other", client, tools=[pay])._tools
    called = await client.create([UserMessage(content="Pay.", source="user")], tools=tools, tool_choice="required")
    assert "amount" in json.loads(called.content[0].arguments), called
    await client.close()


asyncio.run(main())
