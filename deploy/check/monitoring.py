#!/usr/bin/env python3
"""monitoring.py BIN [PICTURE [ROUNDS]]: Prometheus itself over two daemons that move KV, and the dashboard's queries.

Starts two kvferryd of BIN and a Prometheus with deploy/prometheus/rules.yaml, lets kvferry-bench move a
model's KV between the daemons, and then asks each query of deploy/grafana/kvferry.json. Each must be
answered with numbers, and each panel of MOVING below with one above zero. Names of metrics in dashboard and
rules must be on the daemons' page. With PICTURE the panels are drawn as they were answered (by matplotlib:
what Grafana would draw of the same numbers looks different).
"""
import contextlib
import json
import math
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

DEPLOY = pathlib.Path(__file__).resolve().parent.parent
# What two daemons under load cannot show as zero.
MOVING = {"Ready", "Healthy", "Rails up", "Version", "Configuration", "Throughput", "Transfers ended", "Transfer duration",
          "Transfer size", "Stages, p50", "Stages, p99", "Bytes copied", "Arena by state", "Chunks",
          "Rails", "Links and lanes", "Calls", "Processor", "Resident memory", "Descriptors", "Copies", "Credits",
          "Fragments and chunks", "Rails process: processor", "Rails process: memory"}
# What is there with GPUs only.
GPU = "kvferry_gpu_"
LIMIT_S = 90


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def until(what, condition):
    deadline = time.monotonic() + LIMIT_S
    last = None
    while time.monotonic() < deadline:
        try:
            value = condition()
            if value:
                return value
        except OSError as error:
            last = error
        time.sleep(0.1)
    sys.exit(f"not within {LIMIT_S} s: {what} ({last})")


class Prometheus:
    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, path, **parameters):
        answer = json.loads(get(self.base + path + "?" + urllib.parse.urlencode(parameters)))
        if answer["status"] != "success":
            sys.exit(f"{parameters}: {answer}")
        return answer["data"]

    def value(self, query):
        result = self.ask("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None


@contextlib.contextmanager
def process(command, log):
    with open(log, "w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def write_daemon(folder, name, other, ports):
    (folder / f"{name}.toml").write_text(f"""config_version = 1
[node]
id = "{name}"
[[socket]]
path = "{folder}/{name}.sock"
[admin]
socket = "{folder}/{name}.admin"
[http]
port = {ports[name, 'http']}
[peer]
listen = "127.0.0.1:{ports[name, 'peer']}"
[[peers]]
identity = "{other}"
addresses = ["127.0.0.1:{ports[other, 'peer']}"]
[mapped]
socket = "{folder}/{name}.arenas"
""")


def queries(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*")
            yield panel, target, expression


def legend(template, labels):
    return re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m.group(1), ""), template).strip()


def check_names(dashboard, rules, page):
    known = set(re.findall(r"^# HELP (\S+)", page, re.M))
    known |= {name + suffix for name in known for suffix in ("_bucket", "_sum", "_count")}
    used = set(re.findall(r"\b((?:kvferry|process)_[a-z0-9_]+)", json.dumps(dashboard) + rules))
    # File names of documents in runbook lines are none.
    return sorted(name for name in used if name not in known and not name.startswith(GPU))


def draw(picture, dashboard, prometheus, start, end):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [p for p in dashboard["panels"]
             if p["type"] == "timeseries" and not p["targets"][0]["expr"].count(GPU)]
    columns = 4
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.1 * rows))
    for axis, panel in zip(axes.flat, shown):
        axis.set_title(f"{panel['title']} [{panel['fieldConfig']['defaults']['unit']}]", fontsize=9)
        count = 0
        for _, target, expression in queries({"panels": [panel]}):
            for series in prometheus.ask("query_range", query=expression, start=start, end=end, step=1)["result"]:
                points = [(float(t) - start, float(v)) for t, v in series["values"]]
                if all(v == 0 or math.isnan(v) for _, v in points) and count >= 2:
                    continue
                axis.plot(*zip(*points), linewidth=1, label=legend(target["legendFormat"], series["metric"])[:34])
                count += 1
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        if count:
            axis.legend(fontsize=5, ncol=2, loc="upper left")
    for axis in list(axes.flat)[len(shown):]:
        axis.axis("off")
    figure.suptitle("Panels of deploy/grafana/kvferry.json, Prometheus' answers drawn by matplotlib; x: seconds", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(picture, dpi=60)


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    picture = sys.argv[2] if len(sys.argv) > 2 else None
    rounds = sys.argv[3] if len(sys.argv) > 3 else "12"
    dashboard = json.loads((DEPLOY / "grafana/kvferry.json").read_text())
    rules = (DEPLOY / "prometheus/rules.yaml").read_text()
    wrong = []
    with tempfile.TemporaryDirectory(prefix="kvferry-") as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        ports = {(n, use): free_port() for n in "ab" for use in ("http", "peer")}
        for node, other in ("ab", "ba"):
            write_daemon(folder, node, other, ports)
            stack.enter_context(process([binary / "kvferryd", "--config", folder / f"{node}.toml"], folder / f"{node}.log"))
        pages = {n: f"http://127.0.0.1:{ports[n, 'http']}" for n in "ab"}
        for node in "ab":
            until(f"daemon {node} ready", lambda: '"ok"' in get(pages[node] + "/readyz"))

        page = get(pages["a"] + "/metrics")
        lint = subprocess.run(["promtool", "check", "metrics"], input=page, text=True, capture_output=True)
        if lint.returncode != 0:
            wrong.append(f"promtool check metrics: {lint.stdout}{lint.stderr}")
        wrong += [f"no daemon exports {name}" for name in check_names(dashboard, rules, page)]

        (folder / "rules.yaml").write_text(rules)
        # The shipped scrape settings are for the default port; these differ in targets and interval.
        (folder / "prometheus.yml").write_text(f"""global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{folder}/rules.yaml]
scrape_configs:
  - job_name: kvferryd
    static_configs:
      - targets: ['127.0.0.1:{ports['a', 'http']}', '127.0.0.1:{ports['b', 'http']}']
""")
        port = free_port()
        stack.enter_context(process(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                                     f"--web.listen-address=127.0.0.1:{port}"], folder / "prometheus.log"))
        prometheus = Prometheus(port)
        start = time.time()
        until("both daemons scraped", lambda: prometheus.value('sum(up{job="kvferryd"})') == 2)
        bench = subprocess.run([binary / "kvferry-bench", "model", "--model", "llama-3-8b", "--tokens", "1024", "--pair",
                                "tp2:tp4", "--rounds", rounds, "--sender-socket", folder / "a.sock",
                                "--receiver-socket", folder / "b.sock", "--json"], capture_output=True, text=True)
        if bench.returncode != 0:
            sys.exit(f"kvferry-bench: {bench.stdout}{bench.stderr}")
        counted = re.search(r'^kvferry_transfer_bytes_total\{direction="sent"\} (\S+)', get(pages["a"] + "/metrics"), re.M).group(1)
        sent = f'kvferry_transfer_bytes_total{{direction="sent",instance="127.0.0.1:{ports["a", "http"]}"}}'
        until("the last bytes scraped", lambda: prometheus.value(sent) == float(counted))
        end = time.time()

        asked, moved = 0, set()
        for panel, _, expression in queries(dashboard):
            if GPU in expression:
                continue
            asked += 1
            answers = prometheus.ask("query_range", query=expression, start=start, end=end, step=1)["result"]
            numbers = [float(v) for series in answers for _, v in series["values"] if not math.isnan(float(v))]
            if not numbers:
                wrong.append(f"{panel['title']}: no data for {expression}")
            elif max(numbers) > 0:
                moved.add(panel["title"])
        wrong += [f"panel {title}: not there, or nothing but zero" for title in sorted(MOVING - moved)]
        firing = [alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]]
        if firing:
            wrong.append(f"alerts about daemons that are well: {firing}")
        if picture:
            draw(picture, dashboard, prometheus, start, end)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{asked} queries of the dashboard over {counted} bytes moved: {len(wrong)} problems")
    sys.exit(1 if wrong else 0)


main()
