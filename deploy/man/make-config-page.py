#!/usr/bin/env python3
"""kvferryd --print-default-config | make-config-page.py > kvferry.toml.5

The manual page of the configuration, from the one table of keys that the daemon itself goes by.
"""
import re
import sys

HEAD = r""".\" Made by make-config-page.py from "kvferryd --print-default-config"; not written by hand.
.Dd November 28, 2026
.Dt KVFERRY.TOML 5
.Os kvferry
.Sh NAME
.Nm kvferry.toml
.Nd configuration of kvferryd
.Sh DESCRIPTION
A TOML file, named by
.Fl -config
of
.Xr kvferryd 8 .
It needs only
.Cm config_version = 1
and what differs from the defaults.
"""
TAIL = r""".Sh SEE ALSO
.Xr kvferryctl 1 ,
.Xr kvferryd 8
"""


def quoted(text):
    text = text.replace("\\", r"\e")
    return r"\&" + text if text[:1] in (".", "'") else text


def sentences(lines):
    """Comment lines as running text, each sentence on a line of its own, as mdoc wants it."""
    text = " ".join(line for line in lines if line)
    return [quoted(part) for part in re.split(r"(?<=[.:;]) (?=[A-Z])", text) if part]


def main():
    out, comment, in_list = [], [], False

    def end_list():
        nonlocal in_list
        if in_list:
            out.append(".El")
        in_list = False

    for line in sys.stdin.read().splitlines()[1:]:
        optional = re.match(r"#(\[\[?[a-z_]+\]\]?|[A-Za-z_]+ = .*)$", line)
        code = optional.group(1) if optional else line
        if not optional and line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif code.startswith("["):
            end_list()
            out.append(".Ss " + code)
            out += sentences(comment)
            comment = []
        elif " = " in code:
            if not in_list:
                out.append(".Bl -tag -width Ds")
            in_list = True
            out.append(".It Cm " + quoted(code).replace('"', r"\(dq"))
            out += sentences(comment)
            comment = []
        elif not line and comment:
            out += sentences(comment)
            comment = []
    end_list()
    sys.stdout.write(HEAD + "\n".join(out) + "\n" + TAIL)


main()
