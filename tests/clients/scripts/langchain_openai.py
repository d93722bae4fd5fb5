"""Answers, streams, tools and structured output by LangChain, over both of OpenAI's APIs."""

import sys
from typing import Literal

sys.path.pop(0)  # this file has the client's name

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Order(BaseModel):
    """An order."""

    item: Literal["stamp", "pen"]
    count: int = Field(ge=0, le=9)


@tool
def pay(amount: Literal[1, 2]) -> str:
    """Pays."""
    return "paid"


for responses in (False, True):
    model = ChatOpenAI(
        base_url=sys.argv[1], model="average", max_tokens=1000, use_responses_api=responses, temperature=0.5
    )
    assert isinstance(model.invoke("Hello?").content, (str, list))
    assert list(model.stream("Hello?"))
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Order, method=method).invoke("An order."), Order), method
    bound = model.bind_tools([pay], tool_choice="pay")
    message = bound.invoke("Pay.")
    assert message.tool_calls[0]["args"]["amount"] in (1, 2), message
    reply = pay.invoke(message.tool_calls[0])
    model.bind_tools([pay]).invoke([("user", "Pay."), message, reply])
    chunks = list(bound.stream("Pay."))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls[0]["args"]["amount"] in (1, 2), whole
