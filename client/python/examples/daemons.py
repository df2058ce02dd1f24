"""Daemons as child processes on this machine, in a private directory: for examples and tests.

KVFERRY_BIN_DIR says where kvferryd and kvferry-rails are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

READY_SECONDS = 30.0


def free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections, so that none of those takes it
    before the daemon does."""
    while True:
        port = random.randint(12000, 31999)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Daemon:
    """One kvferryd. start() returns once it serves."""

    def __init__(
        self, directory: Path, name: str, port: int, peers: dict[str, int], extra: str = ""
    ) -> None:
        self.name = name
        self.socket = str(directory / f"{name}.sock")
        self.log = directory / f"{name}.log"
        self._http = free_port()
        self._config = directory / f"{name}.toml"
        self._process: subprocess.Popen[bytes] | None = None
        others = "".join(
            f'[[peers]]\nidentity = "{peer}"\naddresses = ["127.0.0.1:{at}"]\n'
            for peer, at in peers.items()
        )
        self._config.write_text(
            f'config_version = 1\n[node]\nid = "{name}"\n'
            f'[[socket]]\npath = "{self.socket}"\n'
            f'[admin]\nsocket = "{directory / name}.admin"\n'
            f'[mapped]\nsocket = "{directory / name}.arenas"\n'
            f"[http]\nport = {self._http}\n"
            f'[peer]\nlisten = "127.0.0.1:{port}"\n'
            f'[arena]\nbytes = "32MiB"\nsegment_bytes = "32MiB"\n{extra}{others}'
        )

    def start(self, environment: dict[str, str] | None = None) -> None:
        program = str(Path(os.environ["KVFERRY_BIN_DIR"]) / "kvferryd")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        limit = time.monotonic() + READY_SECONDS
        while not self._ready():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended at once\n{self.log_tail()}")
            if time.monotonic() > limit:
                raise RuntimeError(f"{self.name} is not ready\n{self.log_tail()}")
            time.sleep(0.02)  # between two questions

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/readyz", timeout=2) as got:
                return bool(got.status == 200)
        except OSError:
            return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


class Pair:
    """Two daemons that know each other, `prefill` and `decode`; a context manager."""

    def __init__(self, extra: str = "") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvferry-python."))
        ports = {"prefill": free_port(), "decode": free_port()}
        self.prefill, self.decode = (
            Daemon(self.directory, name, ports[name], {other: ports[other]}, extra)
            for name, other in (("prefill", "decode"), ("decode", "prefill"))
        )

    def __enter__(self) -> Pair:
        try:
            self.prefill.start()
            self.decode.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.prefill.stop()
        self.decode.stop()
        shutil.rmtree(self.directory, ignore_errors=True)
