"""A model named hub:owner/name: fetched once from a hub (here a small one on the loopback), then found without it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi, errors

from data_prep import hub
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
COMMIT = hashlib.sha1(b"a commit").hexdigest()
FILES = {
    "config.json": b'{"model_type": "t5"}',
    "spiece.model": b"pieces",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights again",
    "flax_model.msgpack": b"and again",
}


class Hub(BaseHTTPRequestHandler):
    """The three kinds of requests by which a client lists and downloads a repository."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/owner/small/tree/(\w+)", path):
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in FILES.items()])
        elif re.fullmatch(r"/api/models/owner/small/revision/(main|" + COMMIT + ")", path):
            self._json({"id": "owner/small", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif (match := re.fullmatch(rf"/owner/small/resolve/{COMMIT}/(.+)", path)) and match[1] in FILES:
            self._send(FILES[match[1]], {"ETag": f'"{_etag(FILES[match[1]])}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, status=404)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    proxies = {
        name: "" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    }
    yield {**os.environ, **proxies, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()


def fetch(environment: dict[str, str], name: str) -> subprocess.CompletedProcess[str]:
    options = ["--config", "minute", "--teacher.folder", name, "--data.tokenizer", name]
    command = [sys.executable, "-m", "pipeline", "fetch", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def local_folder(environment: dict[str, str], name: str) -> subprocess.CompletedProcess[str]:
    code = f"from data_prep.hub import local_folder; print(local_folder({name!r}))"
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=offline, capture_output=True, text=True, timeout=PATIENCE_S
    )


@pytest.mark.parametrize("name", ["hub:owner/small", f"hub:owner/small@{COMMIT}"])
def test_what_was_fetched_is_found_without_a_network(environment: dict[str, str], name: str) -> None:
    assert local_folder(environment, name).returncode == 1
    fetched = fetch(environment, name)
    assert fetched.returncode == 0, fetched.stderr
    folder = Path(fetched.stdout.split(" -> ")[1].strip())
    assert folder.name == COMMIT
    # one kind of weights, and what other frameworks need left out
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {n: c for n, c in FILES.items() if n in ("config.json", "spiece.model", "model.safetensors")}
    assert local_folder(environment, name).stdout.strip() == str(folder)


def test_a_repository_that_is_not_there_is_one_line(environment: dict[str, str]) -> None:
    result = fetch(environment, "hub:owner/nothing")
    assert result.returncode == 2
    assert re.fullmatch(r"error: hub:owner/nothing cannot be fetched: [^\n]+\n", result.stderr), result.stderr


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.HTTPError("no route")

    monkeypatch.setattr(HfApi, "list_repo_files", fail)
    with pytest.raises(ValueError, match=r"^hub:owner/model cannot be fetched: no route; is there internet, or HTTPS"):
        hub.fetch("hub:owner/model")


def test_a_full_cache_is_no_matter_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HfApi, "list_repo_files", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        hub.fetch("hub:owner/model")
    assert raised.value.errno == errno.ENOSPC
