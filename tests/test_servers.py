"""The servers that other tests stand on, and the proxy that counts for them."""

import concurrent.futures
import http.client
import time

import fsspec
import gcsfs
import pytest
import s3fs

from tests.servers import CountingProxy, Reply, http_server, s3_server

DATA = bytes(range(256)) * 64


@pytest.fixture
def directory(tmp_path):
    inner = tmp_path / "checkpoint"
    inner.mkdir()
    (inner / "model.safetensors").write_bytes(DATA)
    (inner / "config.json").write_text("{}")
    return inner


def _s3(server, **options):
    return s3fs.S3FileSystem(**server.storage_options, skip_instance_cache=True, **options)


def test_s3_serves_ranges(s3, directory):
    uri = s3.put(directory)
    fs = _s3(s3)
    assert fs.cat_file(f"{uri}/model.safetensors", start=3, end=700) == DATA[3:700]
    assert sorted(path.rpartition("/")[2] for path in fs.ls(uri)) == ["config.json", "model.safetensors"]


def test_s3_refuses_a_wrong_secret_and_nobody(s3, directory):
    uri = s3.put(directory)
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(**{**s3.storage_options, "secret": "wrong"}).cat_file(f"{uri}/config.json")
    nobody = {name: value for name, value in s3.storage_options.items() if name not in {"key", "secret"}}
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(**nobody, anon=True).cat_file(f"{uri}/config.json")


def test_s3_holds_a_reader_to_the_version_it_asks_for(s3, directory):
    uri = s3.put(directory)
    fs = _s3(s3)
    path = f"{uri}/model.safetensors"
    bucket, _, key = path.removeprefix("s3://").partition("/")
    etag = fs.info(path, refresh=True)["ETag"]
    assert fs.call_s3("get_object", Bucket=bucket, Key=key, IfMatch=etag)["ContentLength"] == len(DATA)
    (directory / "model.safetensors").write_bytes(DATA[::-1])
    s3.put(directory, uri)
    with pytest.raises(OSError, match="pre-condition"):
        fs.call_s3("get_object", Bucket=bucket, Key=key, IfMatch=etag)


def test_a_second_s3_server_may_be_open_to_all(directory):
    with s3_server(anonymous=True) as server:
        uri = server.put(directory)
        options = {"client_kwargs": server.storage_options["client_kwargs"]}
        assert s3fs.S3FileSystem(anon=True, **options).cat_file(f"{uri}/config.json") == b"{}"


def test_a_servers_credentials_are_its_own_whatever_those_of_its_environment_are(s3, directory, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server:
        assert fsspec.filesystem("s3", **server.storage_options).ls(server.put(directory))


def test_gcs_serves_ranges_and_generations(gcs, directory):
    uri = gcs.put(directory)
    path = f"{uri}/model.safetensors"
    fs = gcsfs.GCSFileSystem(**gcs.storage_options, skip_instance_cache=True)
    assert fs.cat_file(path, start=3, end=700) == DATA[3:700]
    before = fs.info(path)["generation"]
    gcs.put(directory, uri)
    fs.invalidate_cache()
    assert fs.info(path)["generation"] != before


def test_gcs_is_found_through_the_environment(gcs, directory, monkeypatch):
    for name, value in gcs.environment.items():
        monkeypatch.setenv(name, value)
    uri = gcs.put(directory)
    with fsspec.open(f"{uri}/config.json", skip_instance_cache=True) as file:
        assert file.read() == b"{}"


def test_http_serves_ranges_on_a_kept_connection(directory):
    with http_server(directory) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("HEAD", "/model.safetensors")
        head = connection.getresponse()
        head.read()
        socket = connection.sock
        connection.request("GET", "/model.safetensors", headers={"Range": "bytes=3-9"})
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (206, DATA[3:10])
        assert connection.sock is socket
        assert reply.headers["Content-Range"] == f"bytes 3-9/{len(DATA)}"
        assert reply.headers["ETag"] == head.headers["ETag"] is not None
        assert int(head.headers["Content-Length"]) == len(DATA)
        connection.close()


def test_the_proxy_counts_by_rank_and_keeps_s3_signatures_valid(s3, directory):
    with CountingProxy(s3.endpoint, listeners=2) as proxy:
        uri = s3.at(proxy.url_for(0)).put(directory)
        path = f"{uri}/model.safetensors"
        proxy.reset()
        for rank, size in enumerate([100, 250]):
            assert _s3(s3.at(proxy.url_for(rank))).cat_file(path, start=0, end=size) == DATA[:size]
        assert _s3(s3.at(proxy.url)).cat_file(path) == DATA
        suffix = ".safetensors"
        assert [proxy.gets(suffix, rank=rank) for rank in (0, 1, None)] == [1, 1, 2]
        served = [proxy.bytes_served(suffix, rank=rank) for rank in (0, 1, None)]
        assert served == [100 + len(DATA), 250, 350 + len(DATA)]
        assert [request.range for request in proxy.select(suffix)] == ["bytes=0-99", "bytes=0-249", None]
        assert [request.status for request in proxy.select(suffix)] == [206, 206, 200]
        with pytest.raises(PermissionError):
            s3fs.S3FileSystem(**{**s3.at(proxy.url).storage_options, "secret": "wrong"}).cat_file(path)


def test_the_proxy_stands_before_gcs_too(gcs, directory):
    with CountingProxy(gcs.endpoint) as proxy:
        uri = gcs.at(proxy.url).put(directory)
        proxy.reset()
        fs = gcsfs.GCSFileSystem(**gcs.at(proxy.url).storage_options, skip_instance_cache=True)
        assert fs.cat_file(f"{uri}/model.safetensors", start=3, end=700) == DATA[3:700]
        assert (proxy.gets(".safetensors"), proxy.bytes_served(".safetensors")) == (1, 697)


def _get(url, **headers):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", "/model.safetensors", headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_a_hook_can_answer_change_and_break(directory):
    def refuse(request, forward):
        return Reply(503, [("Content-Length", "0"), ("Retry-After", "1")])

    def ignore_range(request, forward):
        del request.headers["Range"]
        return forward(request)

    def cut(request, forward):
        def half(chunks):
            yield bytes(next(iter(chunks)))[: len(DATA) // 2]
            raise ConnectionResetError

        reply = forward(request)
        reply.chunks = half(reply.chunks)
        return reply

    with http_server(directory) as url, CountingProxy(url) as proxy:
        proxy.on_request(refuse)
        assert _get(proxy.url) == (503, b"")
        proxy.on_request(ignore_range)
        assert _get(proxy.url, Range="bytes=0-9") == (200, DATA)
        proxy.on_request(cut)
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            _get(proxy.url)
        assert proxy.requests[-1].body_bytes == len(DATA) // 2
        proxy.reset()
        assert _get(proxy.url) == (200, DATA)


def test_the_proxy_is_fast_enough_to_measure_through(tmp_path):
    size = 64 << 20
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with (
        http_server(tmp_path) as url,
        CountingProxy(url) as proxy,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        ranges = [f"bytes={start}-{start + (8 << 20) - 1}" for start in range(0, size, 8 << 20)]
        begin = time.process_time()  # of the client, the proxy and the server, which are all in this process
        replies = list(pool.map(lambda text: _get(proxy.url, Range=text), ranges))
        rate = size / (time.process_time() - begin)
    assert sum(len(body) for _, body in replies) == size == proxy.bytes_served()
    assert rate > 50e6
