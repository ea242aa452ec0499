"""If this fails, `s3://` shards are not found, read or told apart as those of other servers are.

The server is moto's, no part of the requirements; the test runs where both are installed:

    pip install "moto[server]>=5.2,<6" s3fs
"""

import pytest

from dataset.records.address import Address
from dataset.records.streams import remote
from dataset.records.streams.remote import Remote, StreamError

HOW = 'not installed: pip install "moto[server]>=5.2,<6" s3fs'


@pytest.fixture
def bucket(monkeypatch):
    """A function that puts bytes under a key of the bucket `shards`."""
    server = pytest.importorskip("moto.server", reason=HOW)
    pytest.importorskip("s3fs", reason=HOW)
    boto3 = pytest.importorskip("boto3", reason=HOW)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    yield lambda key, body: client.put_object(Bucket="shards", Key=key, Body=body)
    running.stop()


@pytest.mark.full
@pytest.mark.slow
def test_shards_of_s3_are_found_read_and_watched(bucket, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.1,) * 4)
    for number in range(3):
        bucket(f"d/{number}.parquet", bytes(range(100 + number)))
    for address in ("s3://shards/d/*.parquet", "s3://shards/d/{0..2}.parquet"):
        files = Remote(Address(address))
        shards = files.shards()
        assert [(shard.name, shard.size) for shard in shards] == [
            (f"{number}.parquet", 100 + number) for number in range(3)
        ]
        assert files.read(shards[1], 4, 10) == bytes(range(4, 10))
        files.check_unchanged(shards[0])
    bucket("d/0.parquet", bytes(100))  # as long as before
    with pytest.raises(StreamError, match="was changed while it is in use"):
        files.check_unchanged(shards[0])
    for address, message in {
        "s3://shards/e/*.parquet": "nothing there matches it",
        "s3://shards/d/9.parquet": "it is not there",
        "s3://elsewhere/x.parquet": "it is not there",
    }.items():
        with pytest.raises(StreamError, match=message):
            Remote(Address(address)).shards()
