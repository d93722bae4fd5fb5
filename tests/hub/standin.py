"""A model hub on this machine, for tests only: the endpoints that huggingface_hub asks for a push and a pull.

Repositories, the contents of large files by their SHA-256, and every request with its headers are kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from polymerge.sources import hub as reach
from tests.served import Quiet, served

LARGE = (".safetensors",)


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors filter=lfs\n"}])

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]


@dataclass
class Hub:
    """Attributes:
    token: the one that may write and read what is private.
    fail_after: large files that are taken before the connection breaks; None: all.
    """

    token: str = "hf_secret"
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    fail_after: int | None = None
    url: str = ""


class _Answers(Quiet):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        body = self._body()
        hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self._may():
            return self._json({"error": "no"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.repos:
                return self._json({"url": f"{hub.url}/{name}"}, 409)
            hub.repos[name] = Repo("private" in (asked.get("visibility"), asked.get("private") and "private"))
            return self._json({"url": f"{hub.url}/{name}", "name": name})
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._json({"transfer": "basic", "objects": [self._object(o) for o in json.loads(body)["objects"]]})
        _, _, _, owner, name, verb, *_ = path.split("/")
        if verb == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {n: "lfs" if n.endswith(LARGE) else "regular" for n in names}
            return self._json(
                {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
            )
        repo = hub.repos[f"{owner}/{name}"]
        repo.commits.append(self._committed(dict(repo.files), body))
        return self._json({"commitUrl": f"{hub.url}/{owner}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def _committed(self, files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return files

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.blobs:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.hub.url}/put/{asked['oid']}"}}}

    def do_PUT(self) -> None:
        hub, oid = self.hub, self.path.rpartition("/")[2]
        data = self._body()
        if hub.fail_after is not None and len(hub.sent) >= hub.fail_after:
            return self._json({"error": "broken"}, 400)
        hub.blobs[oid] = data
        hub.sent.append(oid)
        return self._json({})

    def _get(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repo = hub.repos.get(name)
        if repo is None or (repo.private and not self._may()):
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if parts[0] != "api":
            file = "/".join(parts[4:])
            return (
                self._file(repo, file) if file in repo.files else self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
            )
        if "tree" in parts:
            return self._json([self._entry(file, data) for file, data in repo.files.items()])
        siblings = [{"rfilename": file} for file in repo.files]
        return self._json(
            {"id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    @staticmethod
    def _entry(file: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if file.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry

    def _file(self, repo: Repo, file: str) -> None:
        data = repo.files[file]
        tag = hashlib.sha256(data) if file.endswith(LARGE) else hashlib.sha1(data)
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{tag.hexdigest()}"'}
        return self._send(data, 200, headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def standin() -> Iterator[Hub]:
    hub = Hub()
    with served(type("Answers", (_Answers,), {"hub": hub})) as hub.url:
        yield hub


@contextmanager
def standin_for_all(folder: Path) -> Iterator[Hub]:
    """The stand-in in the place of the hub of this process, with a cache and a token of its own in a folder."""
    with standin() as made, pytest.MonkeyPatch.context() as patch:
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"  # made of the endpoint when it is imported
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", made.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.setattr(reach, "getproxies", dict)
        patch.setenv("HF_TOKEN", made.token)
        yield made
