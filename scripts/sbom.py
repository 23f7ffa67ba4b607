#!/usr/bin/env python3
"""Prints what the binaries are made of, as CycloneDX 1.6: each crate that is compiled into them or runs while they are built.

usage: scripts/sbom.py [TARGET...]   (default: both targets for Linux)

Which crates these are is what `cargo tree` says for the targets, without those of tests; the sums come from Cargo.lock.
The same sources give the same bytes. Python 3.11 or newer.
"""

import json
import pathlib
import subprocess
import sys
import tomllib
import uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGETS = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]
PACKAGE = "flywheel"


def crates(target):
    """The crates of a target: (name, version) and the licence."""
    command = ["cargo", "tree", "--locked", "--package", PACKAGE, "--target", target, "--edges", "normal,build"]
    command += ["--prefix", "none", "--no-dedupe", "--format", "{p}|{l}"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for line in printed.splitlines():
        package, _, licence = line.partition("|")
        name, version = package.split()[:2]
        yield (name, version.removeprefix("v")), licence


def component(name, version, licence, checksum):
    purl = f"pkg:cargo/{name}@{version}"
    found = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if licence:
        # Older crates write `MIT/Apache-2.0`, which is no expression.
        found["licenses"] = [{"expression": " OR ".join(part.strip() for part in licence.split("/"))}]
    # The crates of this workspace have none.
    if checksum:
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return found


def main():
    locked = (ROOT / "Cargo.lock").read_bytes()
    sums = {(p["name"], p["version"]): p.get("checksum") for p in tomllib.loads(locked.decode())["package"]}
    found = {}
    for target in sys.argv[1:] or TARGETS:
        found.update(crates(target))
    missing = sorted(set(found) - set(sums))
    if missing:
        sys.exit(f"sbom: Cargo.lock does not have {missing}")
    version = next(version for name, version in found if name == PACKAGE)
    components = [
        component(*key, licence, sums[key]) for key, licence in sorted(found.items()) if key[0] != PACKAGE
    ]
    about = component(PACKAGE, version, found[PACKAGE, version], None) | {"type": "application"}
    content = json.dumps(components, sort_keys=True)
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{about['purl']}#{content}").urn,
        "version": 1,
        "metadata": {"component": about},
        "components": components,
    }
    print(json.dumps(bom, indent=1))


main()
