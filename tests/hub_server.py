"""A stand-in for the Hugging Face hub's HTTP server, on this machine: models are uploaded, listed and downloaded."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The server. `models` holds the files of each repository, by name; `asked` the requests; `down` refuses all."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.down = 0  # an HTTP status to answer with

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self):
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.down:
            self.answer(self.server.down, {"error": "out of order"})
            return None
        return unquote(urlparse(self.path).path).strip("/").split("/")

    def do_GET(self):
        match self.route():
            case [""]:
                self.answer(200)
            case ["api", "models", owner, name, "tree", _] if f"{owner}/{name}" in self.server.models:
                files = self.server.models[f"{owner}/{name}"]
                oids = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
                sizes = {file: len(content) for file, content in files.items()}
                entries = [{"type": "file", "path": file, "size": sizes[file], "oid": oids[file]} for file in files]
                self.answer(200, entries)
            case ["api", "models", owner, name, *_] if f"{owner}/{name}" in self.server.models:
                files = self.server.models[f"{owner}/{name}"]
                siblings = [{"rfilename": file} for file in sorted(files)]
                self.answer(200, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": True})
            case [owner, name, "resolve", _, file] if file in self.server.models.get(f"{owner}/{name}", {}):
                content = self.server.models[f"{owner}/{name}"][file]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
            case list():
                self.answer(404, {"error": "no such repository or file"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match self.route():
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
                self.server.models.setdefault(name, {})
                self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
                self.answer(200, {"url": f"{self.server.address}/{name}"})
            case ["api", "models", _, _, "preupload", _]:
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
                self.answer(200, {"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
            case ["api", "models", owner, name, "commit", _]:
                for line in body.splitlines():
                    part = json.loads(line)
                    if part["key"] == "file":
                        content = base64.b64decode(part["value"]["content"])
                        self.server.models[f"{owner}/{name}"][part["value"]["path"]] = content
                url = f"{self.server.address}/{owner}/{name}/commit/{COMMIT}"
                self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
            case ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            case list():
                self.answer(404, {"error": "no such address"})


@contextlib.contextmanager
def serving():
    """Yield a `Hub` that answers until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
