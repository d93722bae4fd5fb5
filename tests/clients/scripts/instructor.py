"""instructor's modes JSON, JSON_SCHEMA and TOOLS, whole and in parts."""

import sys
from typing import Literal

sys.path.pop(0)

import instructor
import openai
from pydantic import BaseModel, Field


class Order(BaseModel):
    item: Literal["stamp", "pen"]
    count: int = Field(ge=0, le=9)


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=sys.argv[1]), mode=mode)
    ask = {"model": "average", "messages": [{"role": "user", "content": "An order."}], "max_tokens": 1000}
    assert isinstance(client.chat.completions.create(response_model=Order, max_retries=0, **ask), Order), mode
    assert list(client.chat.completions.create_partial(response_model=Order, **ask)), mode
# This mode's schema stands in the prompt alone, which a random model does not read: the form is any object.
client = instructor.from_openai(openai.OpenAI(base_url=sys.argv[1]), mode=instructor.Mode.JSON)
ask["extra_body"] = {"guided_json": Order.model_json_schema()}
try:
    client.chat.completions.create(response_model=Order, max_retries=0, **ask)
    raise SystemExit("two forms were taken")
except Exception as error:
    assert "one form" in str(error), error
