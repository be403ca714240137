"""A server that speaks the Hugging Face hub's HTTP API, as far as its own client uses it to read: a repository's info
with its files, its tree, the files of a revision, and the signed URLs of the large ones."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.servers import serving

SIGNATURE = "Signature=signed-for-an-hour"


@dataclasses.dataclass
class Hub:
    """Its repositories, by name: each commit's directory, and the commits that branches and tags name.

    `token`, where it is set, must come with every request but those to a signed URL, where it must not.
    """

    root: Path
    endpoint: str = ""
    token: str | None = None
    commits: dict[str, dict[str, Path]] = dataclasses.field(default_factory=dict)
    refs: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"endpoint": self.endpoint, "token": self.token or False}

    def at(self, endpoint: str) -> Hub:
        return dataclasses.replace(self, endpoint=endpoint)

    def put(self, directory: Path, repo: str, ref: str = "main") -> str:
        """Commit the files of `directory` as all of `repo`, let `ref` name the commit, and return its hash."""
        commits = self.commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = Path(shutil.copytree(directory, self.root / commit))
        self.refs.setdefault(repo, {})[ref] = commit
        return commit

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}", self._info)
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}/tree/{revision}", self._tree)
        app.router.add_get("/api/models/{repo:[^/]+/[^/]+}/tree/{revision}/{path:.+}", self._tree)
        app.router.add_get("/{repo:[^/]+/[^/]+}/resolve/{revision}/{path:.+}", self._resolve)
        app.router.add_get("/lfs/{commit}/{path:.+}", self._large)
        return app

    async def _info(self, request: web.Request) -> web.StreamResponse:
        repo, revision = request.match_info["repo"], request.match_info.get("revision", "main")
        if not self._may(request) or repo not in self.commits:
            return _refused(401, "RepoNotFound")
        commit = self._commit(repo, revision)
        if commit is None:
            return _refused(404, "RevisionNotFound")
        directory = self.commits[repo][commit]
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        siblings = [_sibling(path, str(path.relative_to(directory))) for path in files]
        return web.json_response({"id": repo, "sha": commit, "siblings": siblings})

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        repo, path = request.match_info["repo"], request.match_info.get("path", "")
        if not self._may(request) or repo not in self.commits:
            return _refused(401, "RepoNotFound")
        commit = self._commit(repo, request.match_info["revision"])
        if commit is None or not (directory := self.commits[repo][commit] / path).is_dir():
            return _refused(404, "EntryNotFound")
        root = self.commits[repo][commit]
        return web.json_response([_entry(found, str(found.relative_to(root))) for found in sorted(directory.iterdir())])

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repo, path = request.match_info["repo"], request.match_info["path"]
        if not self._may(request) or repo not in self.commits:
            return _refused(401, "RepoNotFound")
        commit = self._commit(repo, request.match_info["revision"])
        if commit is None or not (file := self.commits[repo][commit] / path).is_file():
            return _refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        if not _is_large(path):
            data = file.read_bytes()
            start, stop, _ = request.http_range.indices(len(data))
            if "Range" in request.headers:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status = 206 if "Range" in request.headers else 200
            return web.Response(
                status=status, body=data[start:stop], headers={**headers, "ETag": f'"{_git_oid(file)}"'}
            )
        headers |= {"X-Linked-ETag": f'"{_sha256(file)}"', "X-Linked-Size": str(file.stat().st_size)}
        store = f"http://localhost:{request.host.rpartition(':')[2]}"  # another host: a client sends no token there
        return web.Response(status=302, headers={**headers, "Location": f"{store}/lfs/{commit}/{path}?{SIGNATURE}"})

    async def _large(self, request: web.Request) -> web.StreamResponse:
        if request.query_string != SIGNATURE or "Authorization" in request.headers:
            return web.Response(status=403)
        return web.FileResponse(self.root / request.match_info["commit"] / request.match_info["path"])

    def _commit(self, repo: str, revision: str) -> str | None:
        found = self.refs[repo].get(revision, revision)
        return found if found in self.commits[repo] else None

    def _may(self, request: web.Request) -> bool:
        return self.token is None or request.headers.get("Authorization") == f"Bearer {self.token}"


def _refused(status: int, code: str) -> web.Response:
    return web.Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": code})


def _sibling(path: Path, name: str) -> dict[str, Any]:
    size = path.stat().st_size
    sibling: dict[str, Any] = {"rfilename": name, "size": size, "blobId": _git_oid(path)}
    if _is_large(name):
        sibling["lfs"] = {"sha256": _sha256(path), "size": size, "pointerSize": 130}
    return sibling


def _entry(path: Path, name: str) -> dict[str, Any]:
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    sibling = _sibling(path, name)
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": sibling["blobId"], "size": sibling["size"]}
    if "lfs" in sibling:
        entry["lfs"] = {"oid": sibling["lfs"]["sha256"], **sibling["lfs"]}
    return entry


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def hub_server(root: Path) -> Iterator[Hub]:
    """A hub without repositories, which keeps its commits in the directory `root`."""
    hub = Hub(root)
    with serving(hub.app()) as hub.endpoint:
        yield hub
