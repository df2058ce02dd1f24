#!/usr/bin/env python3
"""notify.py BIN UNIT: the daemon as systemd would run it: readiness, watchdog, stopping.

There is no systemd as process 1 where this runs, so its part is played: a notification socket and the
environment that the unit's Type=notify and WatchdogSec= give. Also the unit's umask. A stopped daemon must ping no
more, and SIGTERM must be answered with STOPPING and a longer time limit.
"""
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time


def main():
    binary, unit = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2]).read_text()
    assert re.search(r"^Type=notify$", unit, re.M) and re.search(r"^WatchdogSec=30s$", unit, re.M)
    with tempfile.TemporaryDirectory(prefix="kvferry-") as folder:
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        manager.bind(f"{folder}/notify")
        config = pathlib.Path(folder, "kvferry.toml")
        config.write_text(f"""config_version = 1
[[socket]]
path = "{folder}/w.sock"
[admin]
socket = "{folder}/admin.sock"
[http]
port = 0
[arena]
bytes = "64MiB"
[mapped]
socket = "{folder}/arenas.sock"
""")
        # A watchdog of one second instead of 30, so that the pings are seen soon.
        environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "1000000"}
        daemon = subprocess.Popen([binary / "kvferryd", "--config", config], env=environment, umask=0o077,
                                  stderr=subprocess.DEVNULL)

        def told(what, limit=30):
            deadline = time.monotonic() + limit
            while (left := deadline - time.monotonic()) > 0:
                manager.settimeout(left)
                try:
                    text = manager.recv(4096).decode()
                except TimeoutError:
                    break
                if what in text:
                    return text
            return None

        try:
            ready = told("READY=1")
            assert ready and "STATUS=" in ready, f"not ready: {ready}"
            assert os.stat(f"{folder}/w.sock").st_mode & 0o777 == 0o660, "the umask reached the workers' socket"
            for _ in range(3):
                assert told("WATCHDOG=1", 2), "no ping of the watchdog"
            daemon.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
            while told("WATCHDOG=1", 0.1):  # those on their way
                pass
            assert not told("WATCHDOG=1", 1.5), "a daemon that stands still pings"
            daemon.send_signal(signal.SIGCONT)
            assert told("WATCHDOG=1", 5), "no ping after it went on"
            daemon.send_signal(signal.SIGTERM)
            assert told("STOPPING=1"), "stopping is not told"
            assert told("EXTEND_TIMEOUT_USEC=35000000"), "a drain asks for no time"
            assert daemon.wait(30) == 0, f"exit status {daemon.returncode}"
        finally:
            daemon.kill()
            daemon.wait()
    print("ready, watchdog, stopping: as the unit wants them")


main()
