#!/usr/bin/env python3
"""make-monitoring.py FOLDER: the alert rules and the dashboard as Kubernetes wants them.

FOLDER is components/monitoring; a test writes them elsewhere and compares.
"""
import pathlib
import sys

DEPLOY = pathlib.Path(__file__).resolve().parent.parent


def indented(text, by):
    return "".join(" " * by + line if line.strip() else line for line in text.splitlines(True))


def main():
    out = pathlib.Path(sys.argv[1])
    rules = (DEPLOY / "prometheus/rules.yaml").read_text()
    (out / "prometheusrule.yaml").write_text(
        "# Written by make-monitoring.py.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: kvferry\nspec:\n"
        + indented(rules, 2))
    dashboard = (DEPLOY / "grafana/kvferry.json").read_text()
    (out / "dashboard.yaml").write_text(
        "# Written by make-monitoring.py.\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: kvferry-dashboard\n  labels:\n"
        '    grafana_dashboard: "1"\ndata:\n  kvferry.json: |\n' + indented(dashboard, 4))


main()
