"""kvferry beside NIXL and Mooncake: the same fragments at the same places, by turns in one run.

Prints a table of medians, ratios, and with --json an object. See README.md beside tests/bench for
how to run it and what the settings of each are.
"""

import argparse
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT_S = 120  # of any single answer


class Failed(RuntimeError):
    """A contestant could not be started, or did not do its work."""


class Lines:
    """A child process that is spoken to in lines of JSON."""

    def __init__(self, name, command, environment, log):
        self.name = name
        self.log = log
        self.process = subprocess.Popen(  # pylint: disable=consider-using-with
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "wb"),  # pylint: disable=consider-using-with
            env=environment,
            start_new_session=True,
        )
        self.buffer = b""

    def say(self, text):
        try:
            self.process.stdin.write((text + "\n").encode())
            self.process.stdin.flush()
        except OSError as error:
            raise self.failure("has gone") from error

    def hear(self):
        """The next line that is an object."""
        limit = time.monotonic() + LIMIT_S
        while True:
            while b"\n" in self.buffer:
                line, self.buffer = self.buffer.split(b"\n", 1)
                if line.startswith(b"{"):
                    return json.loads(line)
            left = limit - time.monotonic()
            readable = select.select([self.process.stdout], [], [], max(left, 0))[0]
            chunk = os.read(self.process.stdout.fileno(), 1 << 20) if readable else b""
            if not chunk:
                raise self.failure("says nothing" if not readable else "has ended")
            self.buffer += chunk

    def ask(self, **request):
        self.say(json.dumps(request))
        return self.hear()

    def failure(self, what):
        with open(self.log, "rb") as file:
            tail = file.read()[-2000:].decode(errors="replace")
        return Failed(f"{self.name} {what}\n{tail}")

    def end(self):
        """Ends the process and all that it started."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class Kvferry:
    """kvferry-bench, whose rounds wait for a line each."""

    def __init__(self, options, path, places, directory):
        self.name = "kvferry " + path
        command = [options.bench, "fragments", "--step", "--path", path]
        command += ["--fragments", str(options.fragments)]
        command += ["--fragment-bytes", str(options.fragment_bytes)]
        command += ["--rounds", str(options.rounds), "--warm-up", str(options.warm_up)]
        command += ["--seed", str(options.seed), "--places", places]
        for setting in options.set:
            command += ["--set", setting]
        self.settings = {"path": path, "set": options.set}
        self.bench = Lines(self.name, command, dict(os.environ), directory / f"kvferry-{path}.log")
        self.bench.hear()  # ready
        self.report = None

    def warm_up(self):
        pass  # kvferry-bench has its own, before the first line

    def round(self):
        self.bench.say("go")
        return self.bench.hear()

    def end(self):
        if self.report is None and self.bench.process.poll() is None:
            self.bench.end()

    def finish(self):
        self.report = self.bench.hear()
        self.bench.end()
        return self.report["versions"]


class Peer:
    """Two processes of a peer library."""

    def __init__(self, options, name, library, places, directory, environment, arguments):
        self.name = name
        self.settings = {"environment": environment, "arguments": arguments}
        self.ends = []
        command = [options.python, str(HERE / "end.py"), library]
        for side in ("sender", "receiver"):
            full = dict(os.environ) | environment
            log = directory / f"{name.replace(' ', '-')}-{side}.log"
            arguments_of = [side, "--places", places, *arguments]
            self.ends.append(Lines(f"{name} {side}", command + arguments_of, full, log))
        try:
            cards = [end.hear()["card"] for end in self.ends]
            self.ends[0].ask(do="connect", card=cards[1])
        except Failed:
            self.end()
            raise

    def warm_up(self):
        self.round()

    def round(self):
        sender, receiver = self.ends
        receiver.ask(do="clear")
        for end in self.ends:
            end.ask(do="begin")
        receiver.say(json.dumps({"do": "await"}))
        result = sender.ask(do="transfer")
        receiver.hear()
        result["cpu_seconds"] = sum(end.ask(do="end")["cpu_seconds"] for end in self.ends)
        result |= receiver.ask(do="verify")
        return result

    def end(self):
        for end in self.ends:
            end.end()

    def finish(self):
        self.end()


# What both libraries are given. Reasons: tests/bench/README.md.
NIXL_ENVIRONMENT = {"NIXL_LOG_LEVEL": "WARN", "UCX_LOG_LEVEL": "warn", "UCX_NET_DEVICES": "lo"}
NIXL_TRANSPORTS = {
    "tcp": {"UCX_TLS": "tcp"},
    # Without these UCX finds no shared memory for endpoints that notice their peer's end.
    "shm": {"UCX_TLS": "sm,self", "UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y"},
}
MOONCAKE_ENVIRONMENT = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "60000",
    "MC_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}


def contestants(options, directory):
    """Starts all that were asked for; those that cannot be started are told of and left out."""
    places = str(directory / "places.json")
    out = []
    missing = {}
    for path in options.paths:
        out.append(Kvferry(options, path, places, directory))
    makers = []
    for transport, transport_environment in NIXL_TRANSPORTS.items():
        if transport in options.paths and "nixl" in options.peers:
            environment = NIXL_ENVIRONMENT | transport_environment
            for setting in options.nixl_env:
                key, _, value = setting.partition("=")
                environment[key] = value
            arguments = ["--progress-thread"] if options.nixl_progress_thread else []
            makers.append((f"nixl {transport}", "nixl", environment, arguments))
    if "tcp" in options.paths and "mooncake" in options.peers:
        # 65,535 outstanding at most: larger requests go in several batches.
        arguments = ["--batch", "32768"] if options.fragments > 65535 else []
        makers.append(("mooncake tcp", "mooncake", MOONCAKE_ENVIRONMENT, arguments))
    for name, library, environment, arguments in makers:
        try:
            out.append(Peer(options, name, library, places, directory, environment, arguments))
        except Failed as error:
            missing[name] = str(error)
            print(f"{name}: left out: {error}", file=sys.stderr)
    return out, missing


def summary(contestant, rounds, options):
    payload = options.fragments * options.fragment_bytes
    seconds = [result["seconds"] for result in rounds]
    median = statistics.median(seconds)
    cpu = [result["cpu_seconds"] for result in rounds]
    out = {
        "name": contestant.name,
        "rounds": len(rounds),
        "p50_ms": median * 1e3,
        "min_ms": min(seconds) * 1e3,
        "max_ms": max(seconds) * 1e3,
        "gbps": payload / median / 1e9,
        "cpu_s_per_gib": statistics.fmean(cpu) / (payload / 2**30),
        "verified": all(result["verified_bytes"] == payload for result in rounds),
        "settings": contestant.settings,
    }
    for key in ("seconds_without_making", "seconds_to_post"):
        if key in rounds[0]:
            part = statistics.median(result[key] for result in rounds)
            out["p50_ms_" + key.removeprefix("seconds_")] = part * 1e3
    return out


def versions():
    out = {"python": platform.python_version(), "kernel": platform.release()}
    with open("/proc/sys/net/ipv4/tcp_congestion_control", encoding="ascii") as file:
        out["tcp_congestion_control"] = file.read().strip()
    for name in ("nixl", "nixl-cu13", "mooncake-transfer-engine-non-cuda", "numpy"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def measure(options, directory):
    playing = []
    try:
        playing, missing = contestants(options, directory)
        results = {contestant.name: [] for contestant in playing}
        for _ in range(options.warm_up):
            for contestant in playing:
                contestant.warm_up()
        for number in range(options.rounds):
            # Who comes first changes, so that nobody always follows the same one.
            turn = number % len(playing)
            for contestant in playing[turn:] + playing[:turn]:
                results[contestant.name].append(contestant.round())
        told = [summary(contestant, results[contestant.name], options) for contestant in playing]
        found = versions()
        for contestant in playing:
            found |= contestant.finish() or {}
    finally:
        for contestant in playing:
            contestant.end()
    ratios = {}
    for mine in told:
        if not mine["name"].startswith("kvferry "):
            continue
        path = mine["name"].removeprefix("kvferry ")
        for other in told:
            if other["name"].endswith(" " + path) and other is not mine:
                ratios[f"{mine['name']} / {other['name']}"] = mine["gbps"] / other["gbps"]
    return {
        "workload": f"{options.fragments} x {options.fragment_bytes} B",
        "payload_bytes": options.fragments * options.fragment_bytes,
        "contestants": told,
        "ratios": ratios,
        "left_out": missing,
        "verified": all(one["verified"] for one in told),
        "versions": found,
    }


def table(report):
    rows = [f"  {report['workload']}, rounds by turns, medians"]
    rows.append(f"  {'':14}{'p50 ms':>10}{'min ms':>10}{'max ms':>10}{'GB/s':>8}{'CPU s/GiB':>11}")
    for one in report["contestants"]:
        rows.append(
            f"  {one['name']:14}{one['p50_ms']:10.2f}{one['min_ms']:10.2f}{one['max_ms']:10.2f}"
            f"{one['gbps']:8.3f}{one['cpu_s_per_gib']:11.2f}"
        )
    for name, ratio in report["ratios"].items():
        rows.append(f"  {name:30}{ratio:8.2f} times")
    for name in report["left_out"]:
        rows.append(f"  {name:30}left out (see above)")
    rows.append("  every byte verified: " + ("yes" if report["verified"] else "NO"))
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", default=str(HERE.parents[2] / "build/release/bin/kvferry-bench"))
    parser.add_argument("--python", default=sys.executable, help="of the environment with the peers")
    parser.add_argument("--fragments", type=int, default=16384)
    parser.add_argument("--fragment-bytes", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--paths", default="tcp,shm", type=lambda text: text.split(","))
    parser.add_argument("--peers", default="nixl,mooncake", type=lambda text: text.split(","))
    parser.add_argument("--set", action="append", default=[], help="for kvferry's daemons")
    parser.add_argument("--nixl-env", action="append", default=[], help="NAME=VALUE for NIXL")
    parser.add_argument("--nixl-progress-thread", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--json-file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    with tempfile.TemporaryDirectory(prefix="kvferry-peers.") as directory:
        try:
            report = measure(options, Path(directory))
        except Failed as error:
            print(f"compare.py: {error}", file=sys.stderr)
            return 1
    text = json.dumps(report, indent=2)
    if options.json_file:
        Path(options.json_file).write_text(text + "\n", encoding="utf-8")
    print(text if options.json else table(report))
    return 0 if report["verified"] else 1


if __name__ == "__main__":
    sys.exit(main())
