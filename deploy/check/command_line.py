#!/usr/bin/env python3
"""command_line.py BIN: manual pages and completions beside what the programs' --help says.

Each subcommand and option of --help is offered by bash and by zsh, neither offers another, and each
stands in the manual page. The page of the configuration is the one that the daemon's table makes.
"""
import pathlib
import re
import subprocess
import sys

DEPLOY = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {"kvferryd": 8, "kvferryctl": 1, "kvferry-bench": 1}
wrong = []


def run(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, check=True, **more).stdout


def help_of(program, path):
    """The options and subcommands that --help tells."""
    text = run(program, *path, "--help")
    options = re.findall(r"^  (?:-\w,)?(--[a-z-]+)", text, re.M)
    commands = []
    if "\nSubcommands:\n" in text:
        block = text.split("\nSubcommands:\n")[1].split("\n\n")[0]
        commands = re.findall(r"^  ([a-z]+)\b", block, re.M)
    return options, commands


def bash_offers(name, words):
    quoted = " ".join(f"'{word}'" for word in [*words, ""])
    function = "_" + name.replace("-", "_")
    script = (f"source {DEPLOY}/completion/{name}.bash; complete -p {name} >/dev/null; COMP_WORDS=({quoted}); "
              f"COMP_CWORD={len(words)}; {function}; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
    return set(run("bash", "--norc", "-c", script).split())


def zsh_offers(name, words):
    quoted = " ".join(f"'{word}'" for word in [*words, ""])
    script = (f"compadd() {{ shift; print -l -- $@ }}; _files() {{ }}; words=({quoted}); CURRENT={len(words) + 1}; "
              f"source {DEPLOY}/completion/_{name}")
    return set(run("zsh", "-f", "-c", script).split())


def check(binary, name, page, path):
    options, commands = help_of(binary / name, path)
    if not options:
        wrong.append(f"{name} {' '.join(path)}: --help tells no option")
    # What stands before a subcommand is offered there only.
    expected = set(options) | set(commands)
    for shell, offers in (("bash", bash_offers), ("zsh", zsh_offers)):
        offered = offers(name, [name, *path])
        for word in sorted(expected - offered):
            wrong.append(f"{shell} does not offer {name} {' '.join([*path, word])}")
        for word in sorted(offered - expected):
            wrong.append(f"{shell} offers {name} {' '.join([*path, word])}, which --help does not know")
    for word in sorted(expected):
        if not re.search(r"(?<![\w-])" + re.escape(word) + r"(?![\w-])", page):
            wrong.append(f"{name}({PROGRAMS[name]}) does not tell of {' '.join([*path, word])}")
    for command in commands:
        check(binary, name, page, [*path, command])
    return len(expected)


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    for name, section in PROGRAMS.items():
        page = run("mandoc", "-T", "utf8", "-O", "width=200", f"{DEPLOY}/man/{name}.{section}")
        page = re.sub(".\b", "", page)
        check(binary, name, page, [])
    default = run(binary / "kvferryd", "--print-default-config")
    made = run(sys.executable, f"{DEPLOY}/man/make-config-page.py", input=default)
    if made != (DEPLOY / "man/kvferry.toml.5").read_text():
        wrong.append("deploy/man/kvferry.toml.5 is not what the daemon's keys make: "
                     "kvferryd --print-default-config | deploy/man/make-config-page.py > deploy/man/kvferry.toml.5")
    keys = re.findall(r"^#?([a-z_.]+) = ", default, re.M)
    for key in keys:
        if f".It Cm {key} = " not in made and f"\n.Cm {key} = " not in made and key != "config_version":
            wrong.append(f"kvferry.toml(5) does not tell of {key}")
    if len(keys) < 50:
        wrong.append(f"only {len(keys)} keys found in the default configuration")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(PROGRAMS)} programs, {len(keys)} keys of the configuration: {len(wrong)} differences")
    sys.exit(1 if wrong else 0)


main()
