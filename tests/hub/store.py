"""What a Hub knows: accounts, repositories with commits and refs, and large files."""

import base64
import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

LARGE = 10 << 20
"""Files of so many bytes, and safetensors files of any size, are large ones (LFS)."""


class Refusal(Exception):
    """An answer of the Hub that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message or code


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    content: bytes
    large: bool

    @property
    def git_oid(self) -> str:
        """Return what git calls it."""
        data = self.content
        if self.large:
            data = f"version https://git-lfs\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        """Return what LFS calls it."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        """Return what names its version."""
        return self.sha256 if self.large else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository; that of a dataset is called ``datasets/OWNER/NAME``."""

    name: str
    private: bool
    gated: str | bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    @property
    def owner(self) -> str:
        """Return its account."""
        return self.name.split("/")[-2]

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch, tag or hash names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, ref: str, parent: Commit | None, title: str, files: dict[str, Blob]) -> Commit:
        """Add a commit to a ref."""
        names = "".join(f"{path}\0{blob.git_oid}\n" for path, blob in sorted(files.items()))
        above = parent.sha if parent else ""
        text = f"{self.name}\n{above}\n{title}\n{len(self.commits)}\n{names}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        commit = Commit(sha, parent.sha if parent else None, title, files)
        self.commits[sha] = commit
        self.refs[ref] = sha
        return commit


class Hub:
    """All of it.

    Attributes:
        accounts: Token -> account.
        repos: Repository id -> repository.
        large: Content of large files by SHA-256.
        uploaded: Every upload of a file's content: its path or SHA-256, and its bytes.
        failing: How many of the next uploads of large files break off.
    """

    def __init__(self) -> None:
        self.accounts = {"hf_of_me": "me", "hf_of_you": "you"}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.uploaded: list[tuple[str, int]] = []
        self.failing = 0
        self.lock = threading.Lock()

    def account(self, token: str | None) -> str | None:
        """Return who asks; None for nobody."""
        if token is None:
            return None
        if token not in self.accounts:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.accounts[token]

    def repo(self, name: str, account: str | None, *, write: bool = False) -> Repo:
        """Return a repository that an account may see, or change."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and repo.owner != account):
            raise Refusal(401 if account is None else 404, "RepoNotFound", "Repository not found")
        if write and account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if write and repo.owner != account:
            raise Refusal(403, "", "you don't have the rights to write to this repository")
        return repo

    def create(self, name: str, account: str | None, *, private: bool) -> Repo:
        """Create a repository with a first commit."""
        if account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if name.split("/")[-2] != account:
            raise Refusal(403, "", f"You don't have the rights to create a repo under {name}")
        if name in self.repos:
            raise Refusal(409, "", "You already created this repo")
        repo = self.repos[name] = Repo(name, private)
        attributes = Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)
        repo.add("refs/heads/main", None, "initial commit", {".gitattributes": attributes})
        return repo

    def is_large(self, path: str, size: int) -> bool:
        """Whether a file is kept by LFS."""
        return path.endswith(".safetensors") or size >= LARGE

    def commit(
        self, repo: Repo, revision: str, lines: list[dict[str, Any]], *, pull: bool
    ) -> tuple[Commit, int | None]:
        """Apply the lines of a commit's request; return it, and the number of its pull request."""
        with self.lock:
            return self._commit(repo, revision, lines, pull=pull)

    def _commit(
        self, repo: Repo, revision: str, lines: list[dict[str, Any]], *, pull: bool
    ) -> tuple[Commit, int | None]:
        parent = repo.at(revision)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent.sha):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            self._apply(files, line["key"], line["value"])
        number = None
        ref = next(
            (ref for ref in (revision, f"refs/heads/{revision}") if ref in repo.refs), revision
        )
        if pull:
            repo.pulls += 1
            number, ref = repo.pulls, f"refs/pr/{repo.pulls}"
        return repo.add(ref, parent, header["summary"], files), number

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value.get("path", "")
        if key == "file":
            content = base64.b64decode(value["content"])
            self.uploaded.append((path, len(content)))
            files[path] = Blob(content, large=False)
        elif key == "lfsFile":
            if value["oid"] not in self.large:
                raise Refusal(400, "", f"LFS pointer of {path} points to a file that is missing")
            files[path] = Blob(self.large[value["oid"]], large=True)
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(400, "", f"{path} does not exist")
            del files[path]
        elif key == "deletedFolder":
            for inner in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inner]
