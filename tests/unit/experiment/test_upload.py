"""A folder is uploaded to a hub that answers as the real one does, or the reason why not is told."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from parablock.errors import StorageError
from parablock.experiment.upload import check_upload, upload_folder

KEY = "hf_a-key-of-a-test"


class Hub(ThreadingHTTPServer):
    """A hub with the three answers that an upload of small files needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.keys: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.keys.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self._say(401, {"error": f"Invalid username or password: {self.headers.get('Authorization')}"})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._say(200, {"url": f"{self.server.address}/alice/mine", "name": "alice/mine", "id": "alice/mine"})
        elif "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self._say(200, {"files": [_regular(name) for name in names], "commitOid": "0" * 40})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/alice/mine/commit/{'0' * 40}"
            self._say(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self._say(404, {"error": self.path})

    def do_GET(self) -> None:
        self._say(200, {"id": "alice/mine", "sha": "0" * 40, "siblings": [], "tags": []})

    def _say(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def _regular(name: str) -> dict[str, Any]:
    return {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", KEY)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "model.gguf", ".unfinished"):
        (tmp_path / "mine" / name).write_bytes(name.encode())
    return tmp_path / "mine"


@pytest.mark.parametrize("private", [True, False])
def test_the_files_of_a_folder_arrive_with_the_key_of_the_environment(hub: Hub, folder: Path, private: bool):
    check_upload("alice/mine")
    assert upload_folder(folder, "alice/mine", private=private) == f"{hub.address}/alice/mine"
    assert hub.files == {"config.json": b"config.json", "model.gguf": b"model.gguf"}
    (made,) = hub.made
    assert (made.get("private") is True or made.get("visibility") == "private") == private  # older, newer
    assert hub.keys == {f"Bearer {KEY}"}


def test_a_key_that_may_not_write_is_told(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-else")
    with pytest.raises(StorageError, match="the hub did not take") as refused:
        upload_folder(folder, "alice/mine", private=True)
    assert "The folder is whole" in str(refused.value.remedy)
    assert "Bearer …" in str(refused.value) and "somebody-else" not in str(refused.value)
    assert refused.value.__suppress_context__, "no traceback shows it either"
    assert hub.files == {}


def test_white_space_around_a_key_is_no_part_of_it(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", f" {KEY} \r\n")
    check_upload("alice/mine")
    upload_folder(folder, "alice/mine", private=True)
    assert hub.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", ["hf_secret\rand more", "hf_secret and more", "hf_secreß"])
def test_what_no_header_may_hold_is_no_key_and_is_not_shown(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str
):
    monkeypatch.setenv("HF_TOKEN", key)
    for upload in (check_upload, lambda name: upload_folder(folder, name, private=True)):
        with pytest.raises(StorageError, match="HF_TOKEN is no key") as refused:
            upload("alice/mine")
        assert "secre" not in str(refused.value)
    assert hub.keys == set()


@pytest.mark.parametrize("name", ["mine", "alice/mine/too", "alice/mi ne", ""])
def test_what_is_no_name_of_a_repository_is_refused(hub: Hub, name: str):
    with pytest.raises(StorageError, match="is not the name of a repository"):
        check_upload(name)


def test_without_a_key_or_a_hub_nothing_is_begun(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    check_upload("alice/mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StorageError, match="HF_TOKEN is not set"):
        check_upload("alice/mine")
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match="is out of reach") as offline:
        check_upload("alice/mine")
    assert offline.value.cause == "HF_HUB_OFFLINE is set."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="is out of reach") as gone:
        check_upload("alice/mine")
    assert gone.value.cause == "Nothing answers there."
