"""smolagents' agent that calls tools: it is made to call one at every step."""

import sys

sys.path.pop(0)

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def pay(amount: int) -> str:
    """Pays.

    Args:
        amount: how much.
    """
    return "paid"


model = OpenAIServerModel("average", api_base=sys.argv[1], api_key="none", max_tokens=1000)
agent = ToolCallingAgent(tools=[pay], model=model, max_steps=2, verbosity_level=0)
agent.run("Pay.")
steps = [step for step in agent.memory.steps if hasattr(step, "tool_calls")]
assert any(step.tool_calls for step in steps), steps
