"""Running models behind one contract.

base.py            the contract: requests, results, Engine
streaming.py       the contract of an engine that answers many at once
admission.py       what a running batch may hold, and who joins it now
hf_engine.py       a bundle or a plain checkpoint, run by transformers in this process
batching.py        the same with a running batch; answer, running, cache, jobs, text are its parts
vllm_engine.py     an exported bundle, run by a vLLM server
vllm_streaming.py  the same for a server: requests at any time, answers in pieces
vllm_server.py     the server, started and ended
vllm_folder.py     what vLLM is told of an exported bundle, and what it must answer
vllm_scores.py     how likely its models find tokens
vllm_api.py        the server over HTTP
cached.py          an engine that remembers its answers in a file
metered.py         an engine that counts its tokens and seconds
forwarding.py      what these two share
scoring.py         the tokens of a request for a score
sampling.py        how a token is chosen, and when an answer ends
"""

from .base import Engine, GenerateRequest, Generation, Message, Prompt, Score, ScoreRequest

__all__ = ["Engine", "GenerateRequest", "Generation", "Message", "Prompt", "Score", "ScoreRequest"]
