"""What the README and the examples show is run."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import EXAMPLES
from daemons import Pair

README = EXAMPLES.parent / "README.md"


def test_the_readmes_hand_off_runs(pair: Pair) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert code is not None
    names = {"PREFILL": pair.prefill.socket, "DECODE": pair.decode.socket}
    exec(compile(code.group(1), str(README), "exec"), names)


def test_a_transformer_generates_the_same_tokens_disaggregated() -> None:
    pytest.importorskip("torch")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "disaggregated.py"), "tp2:tp1", "tp1:tp2"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("tokens equal") == 8
    assert run.stdout.count("daemon killed: decode has PEER_LOST") == 2
    assert run.stdout.endswith("kvferry example: OK\n")


def test_a_transformer_whose_pages_are_not_what_was_computed_says_something_else() -> None:
    """The example's comparison can fail: what it generates depends on the pages."""
    pytest.importorskip("torch")
    from tiny_model import Cache, Config, Model, reference

    config = Config()
    prompt = list(range(40))
    expected = reference(config, prompt, 12)
    model = Model(config, 1)
    table = list(range(10))
    cache = Cache.private(config, 1)
    first = model.forward(prompt, 0, table, [cache])
    cache.keys[1][3] = cache.keys[1][4].clone()
    assert model.generate(first, 40, 12, table, [cache]) != expected
