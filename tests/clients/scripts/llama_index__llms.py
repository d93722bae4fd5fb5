"""llama-index: answers, streams, calls of tools and a structured answer."""

import sys
from typing import Literal

sys.path.pop(0)

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Order(BaseModel):
    item: Literal["stamp", "pen"]
    count: int = Field(ge=0, le=9)


def pay(amount: Literal[1, 2]) -> str:
    """Pays."""
    return "paid"


model = OpenAILike(
    model="average", api_base=sys.argv[1], api_key="none", is_chat_model=True, is_function_calling_model=True,
    max_tokens=1000,
)  # fmt: skip
assert isinstance(model.complete("Hello?").text, str)
assert list(model.stream_chat([ChatMessage("Hello?")]))
answer = model.chat_with_tools([FunctionTool.from_defaults(pay)], user_msg="Pay.", tool_required=True)
[call] = model.get_tool_calls_from_response(answer)
assert call.tool_kwargs["amount"] in (1, 2), call
assert isinstance(model.as_structured_llm(Order).complete("An order.").raw, Order)
