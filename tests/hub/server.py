"""The Hub's HTTP surface, as ``huggingface_hub`` uses it."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.store import Blob, Hub, Refusal, Repo

_REPO = r"(?P<repo>(datasets/)?[\w.-]+/[\w.-]+)"
_API = rf"/api/(models/|(?=datasets/)){_REPO}"
_ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "who"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"{_API}(/revision/(?P<revision>.+))?", "info"),
    ("GET", rf"{_API}/refs", "refs"),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "history"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths"),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{_API}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", "tag"),
    ("PUT", rf"{_API}/settings", "settings"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", r"/large/(?P<oid>[0-9a-f]{64})/verify", "verify"),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Server(ThreadingHTTPServer):
    """A server of one Hub, which tests may put another in the place of."""

    daemon_threads = True
    hub: Hub

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = Hub()

    @property
    def url(self) -> str:
        """Return where it answers."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer."""
        self._answer("GET")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer."""
        self._answer("POST")

    def do_PUT(self) -> None:
        """Answer."""
        self._answer("PUT")

    def do_DELETE(self) -> None:
        """Answer."""
        self._answer("DELETE")

    # -- what all requests have in common ---------------------------------------------------

    def _answer(self, method: str) -> None:
        address = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        self.body = self._read()
        try:
            token = self.headers.get("authorization", "").removeprefix("Bearer ") or None
            self.account = self.server.hub.account(token)
            for wanted, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and wanted == method:
                    parts = {key: unquote(part) for key, part in match.groupdict("").items()}
                    getattr(self, f"_{name}")(**parts)
                    return
            raise Refusal(404, "", f"no such page: {method} {address.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            answer = {"error": refusal.message}
            if refusal.status == 409 and self.path == "/api/repos/create":
                answer["url"] = f"{self.server.url}/{self._named}"
            self._send(json.dumps(answer).encode(), refusal.status, headers)

    def _read(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        given = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in {**given, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode())

    @property
    def _given(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def _named(self) -> str:
        """Return the repository that a body names in two parts."""
        given = self._given
        kind = "datasets/" if given.get("type") == "dataset" else ""
        return f"{kind}{given.get('organization') or self.account}/{given['name']}"

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        return self.server.hub.repo(name, self.account, write=write)

    # -- accounts and repositories ----------------------------------------------------------

    def _who(self) -> None:
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        role = {"accessToken": {"displayName": "test", "role": "write"}}
        self._json({"type": "user", "name": self.account, "orgs": [], "auth": role})

    def _create(self) -> None:
        given, name = self._given, self._named
        private = bool(given.get("private")) or given.get("visibility") == "private"
        self.server.hub.create(name, self.account, private=private)
        self._json({"url": f"{self.server.url}/{name}", "id": name, "name": name})

    def _delete(self) -> None:
        name = self._named
        self._repo(name, write=True)
        del self.server.hub.repos[name]
        self._json({})

    def _settings(self, repo: str) -> None:
        given = self._given
        found = self._repo(repo, write=True)
        found.private = bool(given.get("private")) or given.get("visibility") == "private"
        found.gated = given.get("gated", False)
        self._json({"private": found.private, "gated": found.gated})

    def _validate(self) -> None:
        text = self._given["content"]
        try:
            yaml.safe_load(text.split("---")[1] if "---" in text else "")
        except yaml.YAMLError as error:
            self._json({"errors": [{"message": str(error)}], "warnings": []})
            return
        self._json({"errors": [], "warnings": []})

    def _info(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        commit = found.at(revision or "main")
        card = commit.files.get("README.md")
        header = card.content.decode().split("---") if card else []
        data = (yaml.safe_load(header[1]) or {}) if len(header) > 2 else {}
        self._json(
            {
                "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
                "id": repo.removeprefix("datasets/"),
                "modelId": repo,
                "author": found.owner,
                "sha": commit.sha,
                "private": found.private,
                "disabled": False,
                "gated": found.gated,
                "downloads": 0,
                "likes": 0,
                "tags": data.get("tags") or [],
                "library_name": data.get("library_name"),
                "cardData": data,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _refs(self, repo: str) -> None:
        refs = self._repo(repo).refs
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        listed = {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        self._json({**listed, "converts": []})

    def _history(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        commit, listed = found.at(revision), []
        while commit:
            listed.append(
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": "",
                    "authors": [],
                    "date": "2026-01-01T00:00:00.000Z",
                }
            )
            commit = found.commits[commit.parent] if commit.parent else None
        self._json(listed)

    # -- reading ----------------------------------------------------------------------------

    def _tree(self, repo: str, revision: str, path: str) -> None:
        files = self._repo(repo).at(revision).files
        inside = f"{path.rstrip('/')}/" if path else ""
        listed, folders = [], set()
        for name, blob in sorted(files.items()):
            if not name.startswith(inside):
                continue
            folder, _, rest = name[len(inside) :].partition("/")
            if rest and self.query.get("recursive", "false").lower() != "true":
                folders.add(inside + folder)
                continue
            listed.append(_entry(name, blob))
        if path and not listed and not folders:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        self._json([{"type": "directory", "path": f, "oid": "0" * 40} for f in folders] + listed)

    def _paths(self, repo: str, revision: str) -> None:
        files = self._repo(repo).at(revision).files
        wanted = parse_qs(self.body.decode())["paths"]  # a form, unlike the others
        self._json([_entry(path, files[path]) for path in wanted if path in files])

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        if found.gated and found.owner != self.account:
            raise Refusal(403 if self.account else 401, "GatedRepo", "Access is restricted.")
        commit = found.at(revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha, "Content-Type": "application/octet-stream"}
        if blob is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(b"Entry not found", 404, headers)
            return
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {
                "X-Linked-Etag": f'"{blob.etag}"',
                "X-Linked-Size": str(len(blob.content)),
            }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if asked is None:
            self._send(blob.content, 200, headers)
            return
        size = len(blob.content)
        first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._send(blob.content[first : last + 1], 206, headers)

    # -- writing ----------------------------------------------------------------------------

    def _preupload(self, repo: str, revision: str) -> None:
        pull = "create_pr" in self.query
        found = self._repo(repo, write=not pull)
        present = found.at(revision).files
        answers = []
        for file in self._given["files"]:
            large = self.server.hub.is_large(file["path"], file["size"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = False
            if file["path"] in present:
                answer["oid"] = present[file["path"]].etag
            answers.append(answer)
        self._json({"files": answers})

    def _commit(self, repo: str, revision: str) -> None:
        pull = "create_pr" in self.query
        found = self._repo(repo, write=not pull)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        commit, number = self.server.hub.commit(found, revision, lines, pull=pull)
        answer: dict[str, Any] = {
            "success": True,
            "commitOid": commit.sha,
            "commitUrl": f"{self.server.url}/{repo}/commit/{commit.sha}",
            "hookOutput": "",
        }
        if number is not None:
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        self._json(answer)

    def _branch(self, repo: str, name: str) -> None:
        found = self._repo(repo, write=True)
        if f"refs/heads/{name}" in found.refs:
            raise Refusal(409, "", f"Reference {name} already exists")
        start = found.at(self._given.get("startingPoint") or "main")
        found.refs[f"refs/heads/{name}"] = start.sha
        self._json({})

    def _tag(self, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        found.refs[f"refs/tags/{self._given['tag']}"] = found.at(revision).sha
        self._json({})

    def _batch(self, repo: str) -> None:
        self._repo(repo)
        objects = []
        for asked in self._given["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.hub.large:
                place = f"{self.server.url}/large/{asked['oid']}"
                upload, verify = {"href": place}, {"href": f"{place}/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        hub = self.server.hub
        hub.uploaded.append((oid, len(self.body)))
        if hub.failing:
            hub.failing -= 1
            self.close_connection = True
            self.connection.close()
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the content has another SHA-256")
        hub.large[oid] = self.body
        self._send(b"")

    def _verify(self, oid: str) -> None:
        if len(self.server.hub.large.get(oid, b"")) != self._given["size"]:
            raise Refusal(404, "", "the content is not there")
        self._json({})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(blob.content),
        "oid": blob.git_oid,
    }
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry
