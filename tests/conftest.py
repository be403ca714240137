"""What every test shares. It is imported before whatever reads the variable that it sets."""

import os
import sys

import pytest

# Else gcsfs, imported against an emulator, asks for a bucket's type over gRPC, and loses 60 s.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# Else torch's store, which looks up the name of whoever connects, stalls for 5 s where no name server answers.
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"


@pytest.fixture(autouse=True)
def fresh_file_systems():
    """fsspec keeps file systems by their options, and would hand a test one that another test's environment shaped."""
    yield
    for module, name in (("s3fs", "S3FileSystem"), ("gcsfs", "GCSFileSystem")):
        if module in sys.modules:
            getattr(sys.modules[module], name).clear_instance_cache()


@pytest.fixture(scope="session")
def s3():
    """An S3 server for the whole session (one for each xdist worker); `s3.put(directory)` gives a new URI."""
    from launch.local_s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def gcs():
    """A GCS server for the whole session."""
    from tests.servers import gcs_server

    with gcs_server() as server:
        yield server
