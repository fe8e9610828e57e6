"""The Hugging Face hub, as far as data sets are read from it: a server of this machine, and the layout of its cache."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants

COMMIT = "a1" * 20
LATER = "b2" * 20


def cached(folder: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT, ref: str = "main") -> None:
    """Puts files where the hub's library keeps what it has fetched."""
    base = folder / ("datasets--" + repo.replace("/", "--"))
    for name, data in files.items():
        blob = base / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = base / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    (base / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (base / "refs" / ref).write_text(commit)


class FakeHub:
    """Serves the repositories of `repos`: name -> revision -> (commit, files). Counts what is asked of it."""

    def __init__(self):
        self.repos = {}
        self.refused = {}
        """Repository -> (status, `X-Error-Code`)."""
        self.asked = []
        self.tokens = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def use(self, monkeypatch, cache: Path) -> None:
        """Makes the hub's library ask this server, and keep what it fetches in `cache`."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request):
        path = unquote(request.path.partition("?")[0])
        self.asked.append((request.command, path))
        self.tokens.append(request.headers.get("Authorization"))
        kind, _, rest = path.lstrip("/").partition("datasets/")
        repo, _, rest = (rest + "/").partition("/")[0] + "/" + rest.split("/")[1], "", "/".join(rest.split("/")[2:])
        if repo in self.refused:
            return self._send(request, self.refused[repo][0], b"{}", {"X-Error-Code": self.refused[repo][1]})
        if repo not in self.repos:
            return self._send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revisions = self.repos[repo]
        if kind == "api/":
            wanted = rest.removeprefix("revision/") or "main"
            if wanted not in revisions:
                return self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            commit, files = revisions[wanted]
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self._send(request, 200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        commit, _, name = rest.removeprefix("resolve/").partition("/")
        data = {c: files for c, files in revisions.values()}[commit][name]
        etag = hashlib.sha256(data).hexdigest()
        return self._send(request, 200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _send(self, request, status, data, headers):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)
