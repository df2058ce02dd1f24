"""Generates kvferry.v1 from the project's protocol files, then builds as pyproject.toml says."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PROJECT = ROOT.parents[1]
PROTOS = ("kvferry/v1/layout.proto", "kvferry/v1/worker.proto")


def generate() -> None:
    from grpc_tools import protoc

    out = ROOT / "src"
    arguments = [f"-I{PROJECT / 'proto'}", f"--python_out={out}", f"--pyi_out={out}"]
    if protoc.main(["protoc", *arguments, *PROTOS]) != 0:
        raise SystemExit("protoc failed")
    (out / "kvferry/v1/__init__.py").write_text('"""Generated from proto/kvferry/v1."""\n')


class Build(build_py):
    def run(self) -> None:
        generate()
        # It was looked for packages before there was this one.
        if "kvferry.v1" not in self.packages:
            self.packages = [*self.packages, "kvferry.v1"]
        super().run()


def version() -> str:
    text = (PROJECT / "CMakeLists.txt").read_text()
    found = re.search(r"project\(kvferry VERSION ([0-9.]+)", text)
    if found is None:
        raise SystemExit("CMakeLists.txt has no version")
    return found.group(1)


setup(version=version(), cmdclass={"build_py": Build})
