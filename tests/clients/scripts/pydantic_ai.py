"""pydantic-ai's agents: text, output by a tool and by a schema, a function to call."""

import sys
from typing import Literal

sys.path.pop(0)

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Order(BaseModel):
    item: Literal["stamp", "pen"]
    count: int = Field(ge=0, le=9)


model = OpenAIChatModel("average", provider=OpenAIProvider(base_url=sys.argv[1], api_key="none"))
settings = {"max_tokens": 1000}
assert isinstance(Agent(model, model_settings=settings).run_sync("Hello?").output, str)
for kind in (ToolOutput, NativeOutput):
    agent = Agent(model, output_type=kind(Order), model_settings=settings)
    assert isinstance(agent.run_sync("An order.").output, Order), kind
