#!/usr/bin/env python3
"""Checks that every dependency's licence is one that deny.toml allows.

Reads the same allow list as `cargo deny check licenses`, so that the gate needs nothing but
cargo and Python.
"""

import json
import re
import subprocess
import sys
import tomllib

TOKEN = re.compile(r"\(|\)|[^\s()/]+(?:\s+WITH\s+[^\s()/]+)?|/")


def allowed(expression: str, allow: set[str]) -> bool:
    """Whether an SPDX expression can be met with the allowed licences alone."""
    tokens = ["OR" if token == "/" else token for token in TOKEN.findall(expression)]

    def alternatives() -> bool:
        met = combination()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            met = combination() or met
        return met

    def combination() -> bool:
        met = licence()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            met = licence() and met
        return met

    def licence() -> bool:
        token = tokens.pop(0)
        if token != "(":
            return token in allow
        met = alternatives()
        tokens.pop(0)
        return met

    return alternatives()


def main() -> None:
    with open("deny.toml", "rb") as file:
        allow = set(tomllib.load(file)["licenses"]["allow"])
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    packages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    bad = [
        f"{package['name']} {package['version']}: {package['license']}"
        for package in packages["packages"]
        if not allowed(package["license"] or "none", allow)
    ]
    if bad:
        sys.exit("licences that deny.toml does not allow:\n  " + "\n  ".join(bad))
    print(f"{len(packages['packages'])} packages have allowed licences")


if __name__ == "__main__":
    main()
