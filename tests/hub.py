"""A local stand-in of the Hub's HTTP interface, serving models and data sets from a folder.

    with Hub(root) as hub:          # root/models/OWNER/NAME/..., root/datasets/OWNER/NAME/...
        subprocess.run([...], env=hub_environment(hub.url, home))

It answers what huggingface_hub, transformers and datasets ask in order to load a model or to stream
a data set: repository information, file tree, path information, and files by HEAD and GET with
ranges. Each repository has one commit, on the branch main; gated ones open to `TOKEN`.
It listens on the loopback only.
"""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_opens_what_is_gated"
DATE = "2025-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer with the headers from which huggingface_hub makes its exceptions."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Repository:
    """One folder, served as one commit."""

    def __init__(self, kind: str, name: str, folder: Path, gated: bool) -> None:
        self.kind, self.name, self.folder, self.gated = kind, name, folder, gated
        self.files = sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )
        digest = hashlib.sha1(name.encode())
        for file in self.files:
            digest.update(file.encode() + (folder / file).read_bytes())
        self.commit = digest.hexdigest()

    def check(self, revision: str) -> None:
        if revision not in ("main", self.commit):
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self) -> dict[str, Any]:
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": self.commit,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": False,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": file} for file in self.files],
        }

    def tree(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = under.strip("/") + "/" if under.strip("/") else ""
        entries: dict[str, dict[str, Any]] = {}
        for file in self.files:
            if not file.startswith(prefix):
                continue
            parts = file.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                if depth == 1 or recursive:
                    entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0"}
            if len(parts) == 1 or recursive:
                entries[file] = self.entry(file)
        if prefix and not entries:
            raise HubError(404, "EntryNotFound", f"{under} does not exist")
        return list(entries.values())

    def entry(self, file: str) -> dict[str, Any]:
        content = (self.folder / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": _oid(content)}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """The server, running in a thread inside `with`; `requests` lists what was asked so far."""

    def __init__(
        self,
        root: Path,
        gated: tuple[str, ...] = (),
        handler: "type[Handler] | None" = None,
    ) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        for kind in ("models", "datasets"):
            for folder in sorted((root / kind).glob("*/*")):
                name = f"{folder.parent.name}/{folder.name}"
                repository = Repository(kind, name, folder, name in gated)
                self.repositories[kind, name] = repository
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler or Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def repository(self, kind: str, name: str) -> Repository:
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[kind, name]


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a subprocess that sees the stand-in at `url` and caches below `home`."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    return environment | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "RECYCLE_CACHE": str(home / "recycle"),
        "NO_PROXY": "127.0.0.1",
    }


_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<path>/.*)?)?"
)
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve"
    r"/(?P<revision>[^/]+)/(?P<path>.+)"
)


class Handler(BaseHTTPRequestHandler):
    """Answers what downloads ask; see tests/hub_upload.py for uploads."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.body()
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.requests.append(f"{self.command} {path}")
        try:
            self.reply(hub, path, parse_qs(url.query), body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send(error.status, json.dumps({"error": error.message}).encode(), headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, hub: Hub, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if found := _FILE.fullmatch(path):
            kind = "datasets" if found["kind"] else "models"
            repository = hub.repository(kind, found["name"])
            self._send_file(repository, found["revision"], found["path"])
        elif found := _API.fullmatch(path):
            repository = hub.repository(found["kind"], found["name"])
            repository.check(found["revision"] or "main")
            self.send_json(self._ask(repository, found["verb"], found["path"], query, body))
        else:
            raise HubError(404, "EntryNotFound", f"the stand-in has no {path}")

    @staticmethod
    def _ask(
        repository: Repository,
        verb: str | None,
        path: str | None,
        query: dict[str, list[str]],
        body: bytes,
    ) -> Any:
        if verb == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return repository.tree(path or "", recursive)
        if verb == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return [repository.entry(file) for file in repository.files if file in wanted]
        return repository.info()

    def _send_file(self, repository: Repository, revision: str, path: str) -> None:
        repository.check(revision)
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(403, "GatedRepo", f"Access to {repository.name} is restricted")
        if path not in repository.files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        content = (repository.folder / path).read_bytes()
        headers = {
            "ETag": f'"{_oid(content)}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        status = 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.send(status, content, headers)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
