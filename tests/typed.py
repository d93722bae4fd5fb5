"""Who types a page's commands: each by what runs it in this process, with what it asks for stood in for.

Knows commands, the hub's stand-in, an endpoint and a server that runs. Does not know pages (`tests/pages.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shlex
import shutil
import sys
import threading
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from queue import Queue
from typing import Any, Self

import pytest

from polymerge.cli.main import main
from polymerge.serve import start as serve_start
from polymerge.serve.run import Running
from polymerge.serve.start import serve_bundle
from tests.hub.standin import Hub, standin_for_all
from tests.served import Quiet, served

HERE = "http://127.0.0.1:8000"  # where the pages' server listens
KEYS = {"ADMIN": "a" * 32, "MY_KEY": "m" * 32}  # environment variables of the pages


class _Thinks(Quiet):
    """An endpoint that has one thought, for the key that it was promised."""

    def do_POST(self) -> None:
        asked = self.body()
        if self.headers["Authorization"] != f"Bearer {KEYS['MY_KEY']}" or asked["model"] != "big-model":
            self.send({"error": {"message": "no"}}, 401)
        else:
            self.asked.append(asked)
            self.send({"choices": [{"message": {"role": "assistant", "content": "two"}, "finish_reason": "stop"}]})

    asked: list[Any]


class Typist:
    """Types commands in the folder where it stands. A context: its servers end with it.

    Args:
        stands_for: words, or what stands behind a word's `=`, in whose place others are typed.
        instead: beginnings of commands, and what is typed in their place.
    """

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        stands_for: Mapping[str, str],
        instead: Mapping[str, str],
    ) -> None:
        self._folder, self._patch, self._capsys = folder, monkeypatch, capsys
        self._stands_for, self._instead = dict(stands_for), instead
        self._opened, self._hub, self._server = contextlib.ExitStack(), list[Hub](), list[Running]()
        self.models: list[str] = []  # what each server said that it serves

    def __enter__(self) -> Self:
        for name, key in KEYS.items():
            self._patch.setenv(name, key)
        self._patch.setattr(serve_start, "serve_bundle", self._until_it_answered)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def run(self, command: str) -> None:
        """Raises AssertionError for one that nobody runs or that failed."""
        by = {"polymerge": self._polymerge, "curl": self._curl, "lm_eval": self._lm_eval, "python": self._python}
        first = command.split()[0]
        assert first in by, f"{command}: run by nobody; list it in NOT_RUN with the reason"
        by[first](command)

    def _words(self, command: str) -> list[str]:
        for beginning, typed in self._instead.items():
            if command.startswith(beginning):
                command = typed + command.removeprefix(beginning)
        stands = self._stands_for
        words = [stands.get(word, word) for word in shlex.split(command.replace("\\\n", " "), comments=True)]
        return [re.sub(r"=(.+)", lambda m: "=" + stands.get(m[1], m[1]), word) for word in words]

    def _polymerge(self, command: str) -> None:
        if "your-org/bundle" in command and not self._hub:
            self._hub.append(self._opened.enter_context(standin_for_all(self._folder)))
        thinks = self._thinker() if "https://host/v1" in command else None
        words = self._words(command)
        _clear(words)
        heard = len(self.models)
        self._ended_well(words, main, command)
        assert words[1] != "serve" or "math" in self.models[heard]
        assert words[1] != "push" or words[3] in self._hub[0].repos
        assert thinks is None or thinks

    def _ended_well(self, words: list[str], call: Any, command: str) -> None:
        self._patch.setattr(sys, "argv", words)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries, which the command line hides
            try:
                call()
                code: Any = 0
            except SystemExit as ended:
                code = ended.code
        printed = self._capsys.readouterr()
        assert code in (0, None), f"{command}\n{printed.out[-1500:]}\n{printed.err[-1500:]}"

    def _thinker(self) -> list[Any]:
        """What the endpoint of the pages is asked from now on."""
        asked: list[Any] = []
        url = self._opened.enter_context(served(type("Thinks", (_Thinks,), {"asked": asked})))
        self._stands_for["https://host/v1"] = f"{url}/v1"
        return asked

    def _running(self) -> str:
        """The address of a server of `bundle`, with an admin's key, which runs as long as this."""
        if not self._server:
            keys = self._folder / "keys"
            keys.write_text(f"admin {KEYS['ADMIN']} admin\n")
            keys.chmod(0o600)
            ready: Queue[Running] = Queue()
            how = {"port": 0, "on_ready": ready.put, "api_key_file": keys, "engine": "transformers", "probe": False}
            thread = threading.Thread(target=serve_bundle, args=["bundle"], kwargs=how)
            thread.start()
            self._server.append(ready.get(timeout=300))
            self._opened.callback(thread.join)
            self._opened.callback(self._server[0].stop)
        return self._server[0].url

    def _curl(self, command: str) -> None:
        words = argparse.ArgumentParser()
        words.add_argument("url")
        words.add_argument("-X", dest="method")
        words.add_argument("-H", dest="headers", action="append", default=[])
        words.add_argument("-d", dest="data")
        given = words.parse_args([word.replace("$ADMIN", KEYS["ADMIN"]) for word in shlex.split(command)[1:]])
        url, data = given.url.replace(HERE, self._running()), given.data.encode() if given.data else None
        headers = dict(header.split(": ", 1) for header in given.headers)
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers, method=given.method), timeout=60
        ) as said:
            assert json.load(said), command

    def _lm_eval(self, command: str) -> None:
        from lm_eval.__main__ import cli_evaluate

        self._patch.setenv("OPENAI_API_KEY", KEYS["ADMIN"])
        self._ended_well([word.replace(HERE, self._running()) for word in self._words(command)], cli_evaluate, command)

    def _python(self, command: str) -> None:
        """What a page's few lines of Python print goes to the file that it names."""
        said = re.fullmatch(r"python -c '(.*)' > (\S+)", command, re.DOTALL)
        read = re.fullmatch(r"python - > (\S+) <<'(\w+)'[^\n]*\n(.*)\n\2", command, re.DOTALL)
        assert said or read, command
        code, file = (said[1], said[2]) if said else (read[3], read[1]) if read else ("", "")
        with Path(file).open("w") as written, contextlib.redirect_stdout(written):
            exec(compile(code, file, "exec"), {})
        assert Path(file).stat().st_size

    def _until_it_answered(self, *bundle: Any, **options: Any) -> None:
        """`serve_bundle` on a free port, which ends when it has said what it serves."""
        told = options.pop("on_ready")

        def ready(running: Running) -> None:
            told(running)
            threading.Thread(target=ask, args=(running,)).start()

        def ask(running: Running) -> None:
            try:
                with urllib.request.urlopen(f"{running.url}/v1/models", timeout=60) as answer:
                    self.models.append(answer.read().decode())
            finally:
                running.stop()

        serve_bundle(*bundle, **options | {"port": 0, "on_ready": ready})


def _clear(words: list[str]) -> None:
    """What a command is to make is not there yet."""
    for flag, value in itertools.pairwise(words):
        if flag in ("-o", "--output", "--html"):
            folder = Path(value).is_dir() and not Path(value).is_symlink()
            shutil.rmtree(value) if folder else Path(value).unlink(missing_ok=True)
