"""A Hugging Face hub of folders that answers on this machine, for programs that download and upload by themselves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        if path in ("api/models", "api/datasets"):
            owner = self.root / path.removeprefix("api/") / parse_qs(url.query)["author"][0]
            listed = [{"id": f"{owner.name}/{path.name}"} for path in sorted(owner.glob("*"))]
            self._answer(200, json.dumps(listed).encode())
        elif path.startswith("api/"):
            self._api(path.split("/")[1:])
        else:
            self._file(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """`repos/create`, `validate-yaml`; of `models/OWNER/NAME`: `preupload/B`, `commit/B` with all files in it."""
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")[1:]
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            repo, what = f"{asked['organization']}/{asked['name']}", "create"
        else:
            repo, what = "/".join(parts[1:3]), "".join(parts[3:4])
        if what == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"]} | how for file in json.loads(body)["files"]]
            self._answer(200, json.dumps({"files": files}).encode())
            return
        for line in map(json.loads, body.splitlines() if what == "commit" else []):
            if line["key"] == "file":
                path = self.root / parts[0] / repo / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        place = f"http://{self.headers['Host']}/{repo}"
        told = {"url": place, "commitUrl": f"{place}/commit/{SHA}", "commitOid": SHA, "errors": [], "warnings": []}
        self._answer(200, json.dumps(told).encode())

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def _api(self, parts: list[str]) -> None:
        """`models|datasets/OWNER/NAME[/revision/main | /tree/main]`, as far as a download asks."""
        kind, repo, what = parts[0], "/".join(parts[1:3]), "".join(parts[3:4])
        folder = self.root / kind / repo
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if not names:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif what == "tree":
            sizes = [{"type": "file", "oid": SHA, "path": n, "size": (folder / n).stat().st_size} for n in names]
            self._answer(200, json.dumps(sizes).encode())
        else:
            siblings = [{"rfilename": name} for name in names]
            info = {"id": repo, "sha": SHA, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self._answer(200, json.dumps(info | {"siblings": siblings}).encode())

    def _file(self, path: str) -> None:
        """`[datasets/]OWNER/NAME/resolve/REVISION/FILE`."""
        repo, _, rest = path.partition("/resolve/")
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        found = self.root / repo / rest.partition("/")[2]
        if not found.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            return
        data = found.read_bytes()
        self._answer(200, data, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub(root: Path) -> Iterator[dict[str, str]]:
    """Serve `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME`; gives the environment for programs that ask it."""
    handler = type("Handler", (_Handler,), {"root": root})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield {
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "no_proxy": "127.0.0.1",
            }
        finally:
            server.shutdown()
