"""`hf://org/name@revision`, as huggingface_hub's file system reads it; every range comes from one commit."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin

from fsspec.core import url_to_fs
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HfUriError, HFValidationError, HTTPError
from huggingface_hub.utils import HfUri, parse_hf_uri

from loader.store.aside import Aside
from loader.store.base import (
    Access,
    Address,
    Addressed,
    Filler,
    IsLate,
    Scheme,
    Stat,
    Transient,
    Unusable,
    by_status,
    changed,
    refusal,
    told,
)
from loader.store.schemes.other import OtherScheme, cat_range

CLIENT_BYTES = 8 << 20  # measured: as for HTTP


class HfScheme:
    """A directory of a repository of the hub. A pin is `commit/oid`: the commit names every byte for good.

    A file's URL at the hub answers with another one, signed and short-lived, at the store that holds the file. That one
    is its address: the hub grants far fewer requests than a load has ranges.
    """

    direct = True

    def __init__(self, fs: Any, repo: HfUri, timeout: float, until: float) -> None:
        """At `until` (monotonic) all reading through the file system ends."""
        self.fs = fs
        self.repo = repo
        self.directory = f"{repo.path_in_repo.rstrip('/')}/" if repo.path_in_repo else ""
        self.timeout = timeout
        self._aside = Aside(math.inf, until)
        self.close = self._aside.close
        self._files: dict[str, Stat] | None = None
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return [name for name in self._list() if "/" not in name]

    def stat(self, name: str) -> Stat:
        try:
            return self._list()[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def _list(self) -> dict[str, Stat]:
        """Every file below the directory, of the commit that the revision names now."""
        with self._lock:
            if self._files is None:
                try:
                    info = self.fs._api.repo_info(  # noqa: SLF001 - with this file system's endpoint and token
                        self.repo.id,
                        repo_type=self.repo.type,
                        revision=self.repo.revision,
                        files_metadata=True,
                        timeout=self.timeout,
                    )
                except Exception as error:
                    raise _translated(error) from error
                self._files = {
                    file.rfilename.removeprefix(self.directory): Stat(file.size, f"{info.sha}/{_oid(file)}")
                    for file in info.siblings
                    if file.rfilename.startswith(self.directory)
                }
                if not self._files:
                    raise FileNotFoundError(f"no files in {self.directory or 'the repository'}")
            return self._files

    def read(self, name: str, pin: str, start: int, buffer: memoryview, _: IsLate) -> None:
        """Through the file system, which goes by the hub for each range."""
        commit = pin.partition("/")[0]
        path = (
            replace(self.repo, revision=commit, path_in_repo=f"{self.directory}{name}").to_uri().removeprefix("hf://")
        )

        def get(_: object) -> bytes:
            try:
                return cat_range(self.fs, path, start, start + len(buffer))
            except Exception as error:
                raise _translated(error) from error

        filler = Filler(buffer)
        filler.add(self._aside.call(get))
        filler.finish()

    def address(self, name: str, pin: str) -> Address:
        """Raises PinError where the hub says that the file's bytes are others. A signed URL gets no token: that is the
        hub's."""
        commit, _, oid = pin.partition("/")
        path = f"{self.directory}{name}"
        url = hf_hub_url(self.repo.id, path, repo_type=self.repo.type, revision=commit, endpoint=self.fs.endpoint)
        headers = self.fs._api._build_hf_headers()  # noqa: SLF001 - as its own files do
        try:
            reply = get_session().head(url, headers=headers, timeout=self.timeout, follow_redirects=False)
        except HTTPError as error:  # of the HTTP client that this version of the hub's has: httpx's, or httpx2's
            raise Transient(told(error)) from error
        if not reply.is_redirect and (refused := by_status(reply.status_code, reply.reason_phrase)):
            raise refused
        told_oid = (reply.headers.get("X-Linked-ETag") or reply.headers.get("ETag") or oid).strip('W/"')
        told_commit = reply.headers.get("X-Repo-Commit", commit)
        if (told_commit, told_oid) != (commit, oid):
            raise changed(name, pin, f"{told_commit}/{told_oid}")
        return Address(urljoin(url, reply.headers["Location"]), {}) if reply.is_redirect else Address(url, headers)

    def pin_of(self, _: Mapping[str, str], pin: str) -> str:
        return pin  # the commit is in the URL that was asked for, and the store behind has names of its own

    refusal = staticmethod(by_status)


def _oid(file: Any) -> str:
    """What the hub gives as the file's ETag: the content's sha256 for a large file, git's own for a small one."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def _translated(error: Exception) -> Exception:
    """What the hub's client raises, in our words. It says of a repository that it may not show that there is none."""
    if isinstance(error, HFValidationError | HfUriError | FileNotFoundError):
        return FileNotFoundError(told(error))
    if isinstance(error, GatedRepoError):
        return PermissionError("a gated repository: accept its terms on the hub, and give a token that may read it")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        if error.response.status_code == 401:
            return FileNotFoundError(f"{told(error)} (or it is private: give a token, as HF_TOKEN)")
        return refusal(error.response.status_code, told(error)) or Transient(told(error))
    if isinstance(error, PermissionError):
        return error
    return Transient(told(error)) if isinstance(error, HTTPError | OSError) else Unusable(told(error))


def open_scheme(access: Access) -> Scheme | Addressed:
    fs, path = url_to_fs(access.uri, **access.storage_options, skip_instance_cache=True)
    repo = parse_hf_uri(f"hf://{path}")
    if repo.is_bucket:
        return OtherScheme(fs, path, access.until, verdict=_translated)
    return HfScheme(fs, repo, access.timeout, access.until)
