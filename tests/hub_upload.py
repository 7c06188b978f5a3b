"""The stand-in of tests/hub.py, to which huggingface_hub's client also uploads.

    with UploadHub(root) as hub:    # hub.requests and hub.commits tell what came
        subprocess.run([...], env=hub_environment(hub.url, home) | {"HF_TOKEN": TOKEN})

It answers who one is, creates repositories of `OWNER`, and takes commits: small files in the commit
itself, weights by the batch interface of Git LFS. The card's metadata is checked as far as the Hub
documents its model-index. `TOKEN` may write there, `READER` may not, and others are not known.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from tests.hub import TOKEN, Handler, Hub, HubError, Repository

OWNER, READER = "tiny", "hf_may_only_read"
_NAME = "(?P<name>[^/]+/[^/]+?)"
_PREUPLOAD = re.compile(rf"/api/models/{_NAME}/preupload/main")
_COMMIT = re.compile(rf"/api/models/{_NAME}/commit/main")
_BATCH = re.compile(rf"/{_NAME}\.git/info/lfs/objects/batch")


class UploadHub(Hub):
    """A `Hub` that writes below its root."""

    def __init__(self, root: Path) -> None:
        (root / "models").mkdir(parents=True, exist_ok=True)
        super().__init__(root, handler=_UploadHandler)
        self.root = root
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, list[str]]] = []
        self.visibility: dict[str, str | None] = {}

    def refresh(self, name: str) -> Repository:
        folder = self.root / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        self.repositories["models", name] = Repository("models", name, folder, False)
        return self.repositories["models", name]

    def commit(self, name: str, lines: list[dict[str, Any]]) -> Repository:
        folder, done = self.root / "models" / name, {"added": [], "deleted": []}  # type: ignore[var-annotated]
        for kind, value in ((line["key"], line["value"]) for line in lines):
            if kind == "header":
                continue
            path = folder / value["path"]
            if kind == "deletedFile":
                path.unlink()
                done["deleted"].append(value["path"])
                continue
            content = (
                self.objects[value["oid"]]
                if kind == "lfsFile"
                else base64.b64decode(value["content"])
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            done["added"].append(value["path"])
        self.commits.append(done)
        return self.refresh(name)


class _UploadHandler(Handler):
    def do_PUT(self) -> None:
        self._answer()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return super().body()
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def reply(self, hub: Hub, path: str, query: dict[str, list[str]], body: bytes) -> None:
        assert isinstance(hub, UploadHub)
        if path == "/api/whoami-v2":
            self._check_token()
            self.send_json({"type": "user", "name": OWNER, "orgs": []})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": _problems(json.loads(body)["content"]), "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self._check_writes(name)
            hub.refresh(name)
            private = {True: "private", None: None, False: "public"}[asked.get("private")]
            hub.visibility[name] = asked.get("visibility", private)
            self.send_json({"url": f"{hub.url}/{name}"})
        elif found := _PREUPLOAD.fullmatch(path):
            self._check_writes(found["name"])
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.send_json({"files": modes})
        elif _BATCH.fullmatch(path):
            objects = [
                x | {"actions": {"upload": {"href": f"{hub.url}/objects/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            self.send_json({"transfer": "basic", "objects": objects})
        elif path.startswith("/objects/"):
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            self.send_json({})
        elif found := _COMMIT.fullmatch(path):
            self._check_writes(found["name"])
            lines = [json.loads(line) for line in body.splitlines()]
            commit = hub.commit(found["name"], lines).commit
            url = f"{hub.url}/{found['name']}/commit/{commit}"
            self.send_json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            super().reply(hub, path, query, body)

    def _check_token(self) -> None:
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", f"Bearer {READER}"):
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def _check_writes(self, name: str) -> None:
        self._check_token()
        if self.headers["Authorization"] != f"Bearer {TOKEN}" or not name.startswith(f"{OWNER}/"):
            raise HubError(403, "Forbidden", "You don't have the rights to write there")


def _problems(card: str) -> list[dict[str, str]]:
    """What of a card's model-index the Hub would refuse."""
    found = []
    for model in (
        ModelCard(card, ignore_metadata_errors=False).data.to_dict().get("model-index", [])
    ):
        for result in model["results"]:
            missing = [x for x in ("name", "type") if not result["dataset"].get(x)]
            missing += [] if result["task"].get("type") else ["task.type"]
            for metric in result["metrics"]:
                missing += [] if isinstance(metric["value"], float) else ["metric.value"]
                missing += [] if metric.get("type") else ["metric.type"]
            found += [{"message": f'"model-index" lacks {x}'} for x in missing]
    return found
