"""Running models behind one contract.

base.py        the contract: requests, results, Engine
hf_engine.py   a bundle or a plain checkpoint, run by transformers in this process
cached.py      an engine that remembers its answers in a file
metered.py     an engine that counts its tokens and seconds
"""

from .base import Engine, GenerateRequest, Generation, Message, Prompt, Score, ScoreRequest

__all__ = ["Engine", "GenerateRequest", "Generation", "Message", "Prompt", "Score", "ScoreRequest"]
