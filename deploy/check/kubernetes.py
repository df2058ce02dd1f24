#!/usr/bin/env python3
"""kubernetes.py BIN: the manifests of deploy/kubernetes, rendered and read.

Each overlay is rendered by "kubectl kustomize" and each of its resources held against the schemas of
Kubernetes (strict: unknown fields are errors). Kinds of others (Prometheus operator, DRA driver) have no schema
here. Then what schemas do not know: that pods, policy and configuration say the same. The configuration is given
to kvferryd --check-config of BIN with the environment of the container.
"""
import os
import pathlib
import subprocess
import sys
import tempfile
import tomllib

import kubernetes_validate
import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent.parent
OVERLAYS = ["sidecar", "daemonset", "rdma", "imex", "monitoring"]
# sidecars are on by default since 1.29, resource claims of this form since 1.31.
VERSIONS = ["1.31", "1.37"]
FOREIGN = {"monitoring.coreos.com/v1", "resource.nvidia.com/v1beta1"}
wrong = []


def require(condition, what):
    if not condition:
        wrong.append(what)


def render(overlay):
    run = subprocess.run(["kubectl", "kustomize", DEPLOY / "kubernetes/overlays" / overlay], capture_output=True, text=True)
    if run.returncode != 0 or run.stderr:
        wrong.append(f"{overlay}: {run.stderr.strip()}")
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def check_schemas(overlay, documents):
    checked = 0
    for document in documents:
        if document["apiVersion"] in FOREIGN:
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
                checked += 1
            except kubernetes_validate.ValidationError as error:
                wrong.append(f"{overlay} {document['kind']} for {version}: {error.message} at {list(error.path)}")
    return checked


def check_pod(overlay, spec, template, config, binary):
    containers = {c["name"]: c for c in spec.get("initContainers", []) + spec["containers"]}
    daemon = containers["kvferryd"]
    at = f"{overlay}: "
    security = daemon["securityContext"]
    require(security["runAsNonRoot"] and security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"],
            at + "the daemon's security context")
    require(security["capabilities"]["drop"] == ["ALL"], at + "capabilities are dropped")
    require(not any(c.get("securityContext", {}).get("privileged") for c in containers.values()), at + "privileged")
    require(spec.get("shareProcessNamespace") or spec.get("hostPID"), at + "the daemon sees no worker's process")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        require(daemon[probe]["httpGet"]["port"] == "metrics", at + probe)
    require(daemon["livenessProbe"]["httpGet"]["path"] == "/healthz", at + "liveness is /healthz")
    require(daemon["readinessProbe"]["httpGet"]["path"] == "/readyz", at + "readiness is /readyz")
    require("worker" not in containers or containers["worker"]["securityContext"]["runAsUser"] != security["runAsUser"],
            at + "worker and daemon are one user")
    if "worker" in containers:
        require(daemon in spec["initContainers"] and daemon.get("restartPolicy") == "Always", at + "no native sidecar")
    for container in containers.values():
        require(container["resources"]["requests"] == container["resources"]["limits"],
                at + container["name"] + " is not guaranteed")
        volumes = {volume["name"] for volume in spec["volumes"]}
        for mount in container.get("volumeMounts", []):
            require(mount["name"] in volumes, at + f"no volume {mount['name']}")
    drain = 30
    require(spec["terminationGracePeriodSeconds"] > drain, at + "ended before it has drained")
    require(template["metadata"]["labels"].get("kvferry.io/rails") == "true", at + "not selected by the network policy")
    ports = {port["name"]: port["containerPort"] for port in daemon["ports"]}
    require(ports["peer"] == int(config["peer"]["listen"].rsplit(":")[-1]), at + "the peers' port")
    check_config(overlay, daemon, config, binary)


def check_config(overlay, daemon, config, binary):
    """As in the pod, but for what only a node has: certificates, an interface, GPUs."""
    environment = {"PATH": os.environ["PATH"]}
    for entry in daemon["env"]:
        value = entry.get("value", "10.244.1.2")
        environment[entry["name"]] = value.replace("$(POD_IP)", environment.get("POD_IP", ""))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([DEPLOY / "make-test-certs.sh", folder, "node"], check=True, capture_output=True)
        file = pathlib.Path(folder, "kvferry.toml")
        file.write_text(config["text"].replace("/etc/kvferry/tls/tls.crt", f"{folder}/node.pem")
                        .replace("/etc/kvferry/tls/tls.key", f"{folder}/node.key")
                        .replace("/etc/kvferry/tls/ca.crt", f"{folder}/ca.pem"))
        run = subprocess.run([binary / "kvferryd", "--config", file, "--check-config"], env=environment,
                             capture_output=True, text=True)
        require(run.returncode == 0 and not run.stderr.strip(), f"{overlay}: --check-config {run.returncode}: {run.stdout}{run.stderr}")
        # And that this check can fail.
        environment["KVFERRY_RAILS_PORT_RANGE"] = ""
        run = subprocess.run([binary / "kvferryd", "--config", file, "--check-config"], env=environment, capture_output=True)
        require(run.returncode == 78, f"{overlay}: --check-config takes rails without a port range")


def check_policy(overlay, documents, config):
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy")
    peers = policy["spec"]["ingress"][0]
    opened = {(port["port"], port.get("endPort", port["port"])) for port in peers["ports"]}
    first, last = (int(port) for port in config["rails"]["port_range"].split("-"))
    require((first, last) in opened, f"{overlay}: the policy opens {opened}, the rails take {first}-{last}")
    require((7400, 7400) in opened, f"{overlay}: the policy does not open the peers' port")
    require(peers["from"] == [{"podSelector": {"matchLabels": {"kvferry.io/rails": "true"}}}], f"{overlay}: others reach rails")


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    checked = 0
    for overlay in OVERLAYS:
        documents = render(overlay)
        checked += check_schemas(overlay, documents)
        text = next(d for d in documents if d["kind"] == "ConfigMap" and "kvferry.toml" in d["data"])["data"]["kvferry.toml"]
        config = {**tomllib.loads(text), "text": text}
        check_policy(overlay, documents, config)
        pods = [d for d in documents if d["kind"] in ("Deployment", "DaemonSet")]
        require(len(pods) == 1, f"{overlay}: {len(pods)} workloads")
        for document in pods:
            template = document["spec"]["template"]
            check_pod(overlay, template["spec"], template, config, binary)
        kinds = {d["kind"] for d in documents}
        if overlay == "imex":
            require("ComputeDomain" in kinds and "'name': 'imex'" in str(pods), "imex: no claim")
        if overlay == "rdma":
            require("rdma/hca_shared_devices_a" in str(pods), "rdma: no device")
        if overlay == "monitoring":
            require({"PodMonitor", "PrometheusRule"} <= kinds, "monitoring: not there")
            rules = next(d for d in documents if d["kind"] == "PrometheusRule")["spec"]
            require(rules == yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text()), "monitoring: other rules")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, DEPLOY / "kubernetes/make-monitoring.py", folder], check=True)
        for file in pathlib.Path(folder).iterdir():
            require(file.read_text() == (DEPLOY / "kubernetes/components/monitoring" / file.name).read_text(),
                    f"{file.name} is old: deploy/kubernetes/make-monitoring.py deploy/kubernetes/components/monitoring")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(OVERLAYS)} overlays, {checked} validations: {len(wrong)} problems")
    sys.exit(1 if wrong else 0)


main()
