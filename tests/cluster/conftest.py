"""A local server of S3."""

import urllib.request

import fsspec
import pytest


@pytest.fixture
def store(monkeypatch):
    """The file system of a server with an empty bucket, which processes find by the environment."""
    moto, boto3 = (
        pytest.importorskip(name, reason=f"{name} is missing; scripts/test_cluster.sh installs it")
        for name in ("moto.server", "boto3")
    )
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "of the test",
        "AWS_SECRET_ACCESS_KEY": "of the test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Servers of one process share their content.
    urllib.request.urlopen(f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset", data=b"").close()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield fsspec.filesystem("s3", use_listings_cache=False)
    server.stop()
