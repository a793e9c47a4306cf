"""A server on this machine that speaks as much of the hub's language as an upload needs. Source: huggingface_hub 2.4, hf_api.py, lfs.py."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".gguf")
TOKEN = "hf_secretsecretsecret"


@dataclass
class Hub:
    """What the server holds, and how it behaves."""

    repositories: dict[str, dict] = field(default_factory=dict)
    """By name: {"private": ..., "files": {name: bytes}}."""
    writable: tuple[str, ...] = ("ann",)
    breaks_at: str | None = None
    """Part of a path on which it hangs up, without an answer."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Contents of large files by their SHA-256, whether they are in a repository or not yet."""
    asked: list[str] = field(default_factory=list)
    """"METHOD path" of every request."""
    url: str = ""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run one on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, *_: object) -> None: ...

    def _answer(self, method: str) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(f"{method} {self.path}")
        if self.hub.breaks_at and self.hub.breaks_at in self.path:
            self.close_connection = True
            self.connection.close()
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}" and method != "PUT":
            self._send(401, {"error": "Invalid username or password."})
        else:
            self._route(content)

    def _route(self, content: bytes) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        match parts:
            case ["api", "whoami-v2"]:
                self._send(200, {"name": "ann", "type": "user", "orgs": []})
            case ["api", "validate-yaml"]:
                self._send(200, {"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(content))
            case ["api", "models", org, name, *rest]:
                self._model(f"{org}/{name}", rest, content)
            case [org, name, "info", "lfs", "objects", "batch"]:
                self._send(200, {"transfer": "basic", "objects": [self._large(each) for each in json.loads(content)["objects"]]})
            case ["large", oid]:
                self.hub.large[oid] = content
                self._send(200, {})
            case _:
                self._send(404, {"error": "not part of this server"})

    def _create(self, asked: dict) -> None:
        if asked.get("organization", "ann") not in self.hub.writable:
            self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        name = f"{asked.get('organization', 'ann')}/{asked['name']}"
        self.hub.repositories[name] = {"private": asked.get("private", asked.get("visibility") == "private"), "files": {}}
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def _model(self, name: str, rest: list[str], content: bytes) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif not rest:
            files = [{"rfilename": each} for each in [".gitattributes", *repository["files"]]]
            self._send(200, {"id": name, "private": repository["private"], "siblings": files, "sha": "0" * 40})
        elif rest[0] == "preupload":
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(content)["files"]
            ]
            self._send(200, {"files": modes})
        elif rest[0] == "commit":
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository["files"][value["path"]] = self.hub.large[value["oid"]]
            self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None})

    def _large(self, asked: dict) -> dict:
        told = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in self.hub.large:
            told["actions"] = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}", "header": {}}}
        return told

    def _send(self, status: int, value: dict, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, each in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, each)
        self.end_headers()
        self.wfile.write(content)
