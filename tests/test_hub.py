"""The Hub is asked once; where it does not answer, only its cache is looked at."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from common import hub
from common.blocks.weights import locate
from common.config import DataError, UserError
from common.data.lerobot import fetch


@pytest.fixture
def real(monkeypatch):
    """hub.reachable() itself, which conftest.py replaces."""
    spec = importlib.util.find_spec("common.hub")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setattr(hub, "reachable", fresh.reachable)
    return fresh


class Server:
    """A Hub on this machine that answers everything with one status; `asked` are the requests."""

    def __init__(self, status):
        self.asked = asked = []
        self.held = held = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(f"{self.command} {self.path}")
                if status is None:
                    held.wait()
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.held.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(status) -> a Server, which is the Hub from then on; its cache is empty."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    servers = []

    def start(status):
        servers.append(Server(status))
        monkeypatch.setattr(constants, "ENDPOINT", servers[-1].url)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("status", [503, None, "refused"])
def test_a_hub_that_does_not_answer_is_asked_once(status, serve, real, monkeypatch):
    monkeypatch.setattr(real, "PATIENCE", 0.2)
    server = serve(503 if status == "refused" else status)
    if status == "refused":
        server.http.socket.close()
    answer = rf"\(no answer from {server.url}, and its cache lacks lab/none or parts of it\)"
    with pytest.raises(DataError, match=rf"(?s)'lab/none' is no folder.*{answer}"):
        fetch("lab/none")
    with pytest.raises(UserError, match=rf"(?s)`hf download lab/none .*{answer}"):
        locate("lab/none", "MIT")
    assert server.asked.count("HEAD /") == (0 if status == "refused" else 2)
    assert not [request for request in server.asked if "lab/none" in request]


@pytest.mark.parametrize("status", [200, 404])
def test_a_hub_that_answers_is_asked_for_the_file(status, serve, real, monkeypatch):
    server = serve(status)
    asked = []
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, lambda *args, **how: asked.append(how) or "/x")
    hub.file("lab/none", "model.safetensors")
    hub.dataset("lab/none")
    assert asked == [{}, {"repo_id": "lab/none", "repo_type": "dataset"}]
    assert server.asked == ["HEAD /"] * 2


def test_the_cache_is_used_without_a_network(serve, real, tmp_path):
    serve(503)
    for kind in ("models", "datasets"):
        folder = tmp_path / f"cache/{kind}--lab--cloth"
        (folder / "snapshots/0123").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0123")
        (folder / "snapshots/0123/model.safetensors").write_text(json.dumps({}))
    assert fetch("lab/cloth") == tmp_path / "cache/datasets--lab--cloth/snapshots/0123"
    file = tmp_path / "cache/models--lab--cloth/snapshots/0123/model.safetensors"
    assert locate("lab/cloth", "MIT") == file


def test_offline_by_choice_asks_nothing(serve, real, monkeypatch):
    server = serve(200)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="LocalEntryNotFoundError"):
        fetch("lab/none")
    assert server.asked == []
