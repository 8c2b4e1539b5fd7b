"""An S3 server of its own process for tests: moto's, on a free port."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gateway.blobs import BlobStore, open_blobs

_START_S = 30.0
# moto takes any key
KEY = {"access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}
_SERVER = "from moto.server import ThreadedMotoServer as S; import time; s = S('127.0.0.1', 0, verbose=False); s.start(); print(s.get_host_and_port()[1], flush=True); time.sleep(1e6)"


@dataclass
class S3Server:
    """A running server.

    Attributes:
        port: on 127.0.0.1.
        process: to be stopped, to see what happens without it.
    """

    port: int
    process: subprocess.Popen[bytes]
    buckets: list[str] = field(default_factory=list)

    def blobs(self, prefix: str = "") -> BlobStore:
        """A new bucket."""
        name = f"bucket-{len(self.buckets)}"
        self.buckets.append(name)
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        return self.open(name, prefix)

    def open(self, bucket: str, prefix: str = "") -> BlobStore:
        settings: dict[str, Any] = {**KEY, "endpoint": f"http://127.0.0.1:{self.port}"}
        return open_blobs(f"s3://{bucket}/{prefix}", **settings)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Starts one and stops it at the end."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        _until_up(port)
        yield S3Server(port, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _until_up(port: int) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < until, "the S3 server does not start"
            time.sleep(0.05)
