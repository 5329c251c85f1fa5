"""Fixtures that several test files of this room share."""

import uuid
from collections.abc import Iterator

import fsspec
import pytest


@pytest.fixture(scope="session")
def store_endpoint() -> Iterator[str]:
    """An S3 emulator on a free port of this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def kept_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let finished scoring runs keep their attempts ledger."""
    monkeypatch.setattr("curate.pipeline.scoring.score.forget_attempts", lambda folder: None)


@pytest.fixture
def object_store(store_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, with the environment that finds it."""
    for key, value in {
        "AWS_ENDPOINT_URL": store_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"
