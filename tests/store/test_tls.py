"""TLS: a server that no known authority vouches for is refused; with its authority in the environment it is read."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.checkpoints import random_checkpoint
from tests.processes import ROOT, python_path
from tests.servers import http_server

pytestmark = pytest.mark.timeout(400)  # several programs start, one after another

AUTHORITIES = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"]
"""Where the environment says whom to trust; a machine may have any of them set."""


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test of the loader")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    return certificate, private


def load(directory: Path, url: str, backend: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: clients look for authorities once."""
    config = directory / "cfg.yaml"
    sections = {"source": {"uri": url}, "model": {"builder": None}, "read": {"backend": backend, "retries": 1}}
    config.write_text(json.dumps({**sections, "report": None}))
    return subprocess.run(
        [sys.executable, "-m", "loader.init_from_hf", "--config", config],
        env={**os.environ, "PYTHONPATH": python_path(), **env}, cwd=ROOT, capture_output=True, text=True, timeout=190,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["direct", "fsspec"])
def test_a_self_signed_server(tmp_path, backend):
    random_checkpoint(tmp_path / "served", {"weight": (torch.float32, (9, 9))})
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http_server(tmp_path / "served", tls=context) as url:
        assert url.startswith("https://")
        refused = load(tmp_path, url, backend)
        assert refused.returncode == 1, refused.stderr
        assert "certificate verify failed" in refused.stderr.lower()
        read = load(tmp_path, url, backend, **dict.fromkeys(AUTHORITIES, str(certificate)))
        assert read.returncode == 0, read.stderr
