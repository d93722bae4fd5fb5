"""Other people's clients against the server, unchanged, each in a process of an environment that has them:

    python3 -m venv /tmp/clients
    /tmp/clients/bin/pip install openai langchain-openai litellm instructor 'pydantic-ai-slim[openai]' \\
        llama-index-llms-openai-like 'smolagents[openai]' llm 'autogen-ext[openai]' autogen-agentchat mcp
    (mkdir /tmp/node && cd /tmp/node && npm install openai)
    POLYMERGE_CLIENTS_PYTHON=/tmp/clients/bin/python POLYMERGE_CLIENTS_NODE=/tmp/node pytest -m clients

LiteLLM imports `mcp` where a request has tools, without asking for it. The model is random and writes nothing sensible:
forms, calls and the clients' own parsing must hold all the same.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from polymerge.engine.local.batching import BatchingEngine
from polymerge.engine.local.engine import HFEngine
from polymerge.serve.app import create_app
from tests.serve.conftest import Server, running
from tests.tiny import text_model, text_tokenizer

PYTHON, NODE = os.environ.get("POLYMERGE_CLIENTS_PYTHON"), os.environ.get("POLYMERGE_CLIENTS_NODE")
SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))
SECONDS = 300

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def talking() -> Iterator[Server]:
    tokenizer = text_tokenizer()
    engine = BatchingEngine(HFEngine(text_model(tokenizer), tokenizer, fingerprint="text"))
    with running(create_app(engine), engine) as started:
        yield started
    engine.close(0)


@pytest.mark.skipif(not PYTHON, reason="POLYMERGE_CLIENTS_PYTHON names no python that has the clients")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_client_of_python_works_unchanged(talking: Server, script: Path, tmp_path: Path) -> None:
    module = script.stem.split("__")[0]
    if subprocess.run([str(PYTHON), "-c", f"import {module}"], capture_output=True, cwd=tmp_path).returncode:
        pytest.skip(f"{PYTHON} has no {module}")
    _ran([str(PYTHON), str(script), f"{talking.url}/v1"], tmp_path)


@pytest.mark.skipif(not NODE or not shutil.which("node"), reason="POLYMERGE_CLIENTS_NODE names no folder with openai")
def test_the_client_of_javascript_works_unchanged(talking: Server, tmp_path: Path) -> None:
    script = Path(str(NODE)) / "polymerge-client.mjs"
    shutil.copy(SCRIPTS[0].with_name("openai.mjs"), script)  # modules are looked for beside a script
    _ran(["node", str(script), f"{talking.url}/v1"], tmp_path)


def _ran(command: list[str], folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OPENAI_API_KEY")}
    environment |= {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=folder, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
