"""Downloads from a hub that runs in this process, by huggingface_hub in another: it reads its settings once."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cosmos.checkpoints import embedded
from nemo_cosmos.checkpoints.load import load_tokenizer
from nemo_cosmos.errors import UserError
from nemo_cosmos.weight_files import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"model.pt": os.urandom(300_000), "config.json": b"{}", "guardrail/big.bin": b"not wanted"}
REPO = "nvidia/Cosmos-Test"


class _Hub(http.server.ThreadingHTTPServer):
    """What the hub answers of one repository; keeps what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.listed = dict(FILES)
        self.files = dict(FILES)
        self.asked: list[tuple[str, str | None]] = []
        self.breaks_after: int | None = None
        self.refuses = False


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        name = self.path.split(f"/resolve/{COMMIT}/")[-1]
        if self.server.refuses:
            self._answer(401, {"X-Error-Code": "GatedRepo", "Content-Length": "0"})
        elif self.path.startswith(f"/api/models/{REPO}/revision/main"):
            listed = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.listed]}
            body = json.dumps(listed).encode()
            self._answer(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)
        elif self.path.startswith("/api/"):
            self._answer(404, {"X-Error-Code": "RevisionNotFound", "Content-Length": "0"})
        elif name in self.server.files:
            self._file(name)
        else:
            self._answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        content, wanted = self.server.files[name], self.headers.get("Range")
        if self.command == "GET":
            self.server.asked.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {
            "ETag": f'"{hashlib.sha256(self.server.listed[name]).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - start),
        }
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if self.command == "GET" and self.server.breaks_after is not None:
            body = body[: self.server.breaks_after]
        self._answer(206 if wanted else 200, headers, body)


@pytest.fixture
def server() -> Iterator[_Hub]:
    with _Hub() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def fetch(server: _Hub, cache: Path, address: str, **environment: str) -> str:
    """What `hub.fetch` gives, or the error that it raises."""
    code = (
        "import sys; from nemo_cosmos.weight_files.hub import fetch; from nemo_cosmos.errors import UserError\n"
        "try: print(fetch(sys.argv[1]))\n"
        "except UserError as error: print(error)"
    )
    return run(server, cache, code, address, **environment)


def run(server: _Hub, cache: Path, code: str, *arguments: str, **environment: str) -> str:
    """What code prints whose hub is the server."""
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command, variables = [sys.executable, "-c", code, *arguments], {**os.environ, **settings, **environment}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout.strip()


def test_a_broken_download_goes_on_where_it_stopped_and_then_serves_offline(server: _Hub, tmp_path: Path) -> None:
    server.breaks_after = 100_000
    assert "the download broke off" in fetch(server, tmp_path, f"hf://{REPO}")
    server.breaks_after = None
    server.asked.clear()
    folder = Path(fetch(server, tmp_path, f"hf://{REPO}"))
    assert folder.name == COMMIT
    assert (folder / "model.pt").read_bytes() == FILES["model.pt"]
    assert not (folder / "guardrail").exists()
    (resumed,) = [wanted for name, wanted in server.asked if name == "model.pt"]
    assert resumed == "bytes=100000-"
    server.asked.clear()
    assert fetch(server, tmp_path, f"hf://{REPO}/model.pt", HF_HUB_OFFLINE="1") == str(folder / "model.pt")
    assert fetch(server, tmp_path, f"hf://{REPO}@{COMMIT}", HF_HUB_OFFLINE="1") == str(folder)
    assert server.asked == []


def test_what_goes_wrong_is_said_plainly(server: _Hub, tmp_path: Path) -> None:
    told = fetch(server, tmp_path, f"hf://{REPO}", HF_HUB_OFFLINE="1")
    assert "is not in the cache and cannot be fetched" in told
    assert "HF_HUB_OFFLINE" in told
    assert "no such revision" in fetch(server, tmp_path, f"hf://{REPO}@v9")
    assert "the repository has no weights.pt" in fetch(server, tmp_path, f"hf://{REPO}/weights.pt")
    server.refuses = True
    told = fetch(server, tmp_path, f"hf://{REPO}")
    assert "Accept its licence on the hub, then log in (hf auth login, or HF_TOKEN)" in told


def test_a_file_that_is_not_what_the_hub_says_is_refused(server: _Hub, tmp_path: Path) -> None:
    server.files["model.pt"] = bytes(len(FILES["model.pt"]))
    assert "its SHA-256 is not" in fetch(server, tmp_path, f"hf://{REPO}/model.pt")


@pytest.mark.parametrize("address", ["hf://nvidia", "hf://", "hf://a b/c/", "hf://nvidia/x@/y"])
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"expected hf://OWNER/NAME|no name of a repository|cannot be fetched"):
        hub.fetch(address)


def test_only_addresses_are_addresses() -> None:
    assert hub.is_address("hf://nvidia/Cosmos-Predict1-7B-Text2World/model.pt")
    assert not hub.is_address("nvidia/Cosmos-Predict1-7B-Text2World")


_EVERY_PLACE = """
import sys
from nemo_cosmos.checkpoints.convert import convert
from nemo_cosmos.checkpoints.load import find_network, load_tokenizer
from nemo_cosmos.diffusion.warm_start import load_whole_weights
from nemo_cosmos.generation.open import find_world_model
from nemo_cosmos.parallel.startup import initialize
from nemo_cosmos.post_training.start import find_base
from nemo_cosmos.tokenizer import load

tokenizer, wfm, target = sys.argv[1:]
convert(tokenizer, target, to="diffusers")
told = [load_tokenizer(tokenizer).model.fingerprint(), load.load(tokenizer).model.fingerprint()]
source = find_world_model(wfm, tokenizer)
told.append(source.load_tokenizer().fingerprint())
with initialize():
    load_whole_weights(source.network.load(), wfm)
told += [find_network(wfm).card.model, find_base(wfm).weights.name, find_base(wfm).card.exists()]
print(*told)
"""


def test_every_place_that_takes_a_checkpoint_takes_an_address(server: _Hub, tmp_path: Path) -> None:
    for name in ("tokenizer_tiny", "diffusion_tiny_text2world"):
        for suffix in (".safetensors", ".json"):
            server.listed[f"tiny/{name}{suffix}"] = (embedded.WEIGHTS / f"{name}{suffix}").read_bytes()
    server.files = server.listed
    tokenizer, wfm = (
        f"hf://{REPO}/tiny/{name}.safetensors" for name in ("tokenizer_tiny", "diffusion_tiny_text2world")
    )
    told = run(server, tmp_path / "cache", _EVERY_PLACE, tokenizer, wfm, str(tmp_path / "vae")).split()[-6:]
    fingerprint = load_tokenizer("tokenizer_tiny").model.fingerprint()
    assert told == [*[fingerprint] * 3, "diffusion_tiny_text2world", "diffusion_tiny_text2world.safetensors", "True"]
    assert load_tokenizer(tmp_path / "vae").model.fingerprint() == fingerprint
    assert [name for name, _ in server.asked].count("tiny/diffusion_tiny_text2world.safetensors") == 1
