#!/usr/bin/env python3
"""Turns leg.pml.in into a Promela model: gen.py SOURCE TARGET [NAME[=VALUE] ...]

The source writes an action over "any chunk", "any offer", ... as
    :: atomic{ c=0; do :: c<NC-1 -> c++ :: break od; GUARD -> BODY }
which Spin would explore as a loop of its own with many states in between. This script runs the C
preprocessor and unrolls each such action into one alternative for each value,
    :: atomic{ (GUARD with c=0) -> c=0; BODY }, ...
then makes every alternative a d_step and clears the helper variables at its end, so that states
differ only in what matters.
"""
import itertools
import re
import subprocess
import sys

HELPERS = ("i", "j", "k", "c", "o", "q", "l", "g", "g0")
ACTION = re.compile(r"(?m)^(?=\s*:: atomic\{|\s*od;|\s*:: else -> break)")
CHOICE = re.compile(r"(\w+)=0; do :: \1<(\w+) ?-1 -> \1\+\+ :: break od; ")
CHOICES = re.compile(
    r"\s*:: atomic\{ ((?:\w+=0; do :: \w+<\w+ ?-1 -> \w+\+\+ :: break od; )+)")


def bounds(defines):
    """The values of the bounds that the choices name; the defaults are those of the model."""
    known = {"NC": 2, "NO": 4, "NQ": 5, "NG": 2, "LEGS": 1}
    known.update({name: int(value) for name, value in defines.items() if value.isdigit()})
    return known


def unrolled(action, known):
    """The alternatives that one action stands for."""
    head = CHOICES.match(action)
    if not head:
        return [action]
    guard, body = re.split(r"\s->\s", action[head.end():], maxsplit=1)
    names, counts = zip(*CHOICE.findall(head.group(1)))
    ranges = [range(int(n) if n.isdigit() else known[n]) for n in counts]
    result = []
    for values in itertools.product(*ranges):
        bound = guard
        for name, value in zip(names, values):
            bound = re.sub(r"\b%s\b" % name, str(value), bound)
        chosen = " ".join("%s=%d;" % pair for pair in zip(names, values))
        result.append(" :: atomic{ (%s) -> %s %s" % (bound, chosen, body))
    return result


def cleared(action):
    """The same with its helper variables set back, if it is one."""
    if not action.lstrip().startswith(":: atomic{"):
        return action
    resets = "; ".join(name + "=0" for name in HELPERS)
    return action.rstrip()[:-1] + "; " + resets + " }\n"


def main():
    source, target, *arguments = sys.argv[1:]
    defines = dict(a.split("=", 1) if "=" in a else (a, "1") for a in arguments)
    text = subprocess.run(
        ["gcc", "-E", "-P", "-xc", *("-D" + a for a in arguments), source],
        check=True, capture_output=True, text=True).stdout
    known = bounds(defines)
    actions = [part for action in ACTION.split(text) for part in unrolled(action, known)]
    with open(target, "w", encoding="utf-8") as out:
        out.write("".join(map(cleared, actions)).replace(":: atomic{", ":: d_step{"))


if __name__ == "__main__":
    main()
