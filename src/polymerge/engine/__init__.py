"""Running models behind one contract.

base.py        the contract: requests, results, Engine
streaming.py   the contract of an engine that answers many at once
defaults.py    what a checkpoint's generation_config.json says of requests
sampling.py    how a token is chosen
text.py        when it becomes text, and where stop texts are
answer.py      one answer from its request to its end
admission.py   which of those who wait join a batch
chat.py        a conversation as token ids
scoring.py     the tokens of a request for a score
jobs.py        other work for the thread that owns a model
local/         a bundle or a plain checkpoint, run by transformers in this process
vllm/          an exported bundle, run by a vLLM server
wrappers/      engines before an engine: one that remembers its answers, one that counts
"""

from .base import Engine, GenerateRequest, Generation, Message, Prompt, Score, ScoreRequest

__all__ = ["Engine", "GenerateRequest", "Generation", "Message", "Prompt", "Score", "ScoreRequest"]
