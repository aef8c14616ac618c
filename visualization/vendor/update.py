"""Take another release of NiiVue, the viewer's slices and surfaces in WebGL, into this folder.

    npm view @niivue/niivue@0.69.0 dist.integrity
    npm pack @niivue/niivue@0.69.0
    python -m visualization.vendor.update niivue-niivue-0.69.0.tgz --integrity sha512-...

The package is checked against the integrity that the registry names before anything of it is kept. niivue.json says
what is here; the tests compare the file with it. NiiVue's licence, niivue.LICENSE, is not in the package: see
https://github.com/niivue/niivue whether it is still the same.
"""

import argparse
import base64
import hashlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from core.system.exits import DONE, REFUSED, refusing, run_command
from core.system.files import whole_file

FOLDER = Path(__file__).resolve().parent
NAME, MEMBER = "niivue.umd.js", "package/dist/niivue.umd.js"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 the package was refused."""
    parser = argparse.ArgumentParser(prog="python -m visualization.vendor.update", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="what npm pack wrote")
    parser.add_argument("--integrity", required=True, help="sha512-... as the registry names it")
    args = parser.parse_args(arguments)
    with refusing(REFUSED):
        packed = args.package.read_bytes()
        found = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
        if found != args.integrity:
            raise ValueError(f"{args.package}: its integrity is {found}, expected {args.integrity}; get it again")
        with tarfile.open(args.package) as package:
            script = package.extractfile(MEMBER).read()
            about = json.load(package.extractfile("package/package.json"))
        facts = {
            "name": about["name"],
            "version": about["version"],
            "licence": about["license"],
            "package_integrity": found,
            "file": NAME,
            "sha256": hashlib.sha256(script).hexdigest(),
        }
        for name, content in ((NAME, script), ("niivue.json", (json.dumps(facts, indent=2) + "\n").encode())):
            with whole_file(FOLDER / name) as temporary:
                temporary.write_bytes(content)
    print(f"{NAME} is that of {facts['name']} {facts['version']} now")
    return DONE


if __name__ == "__main__":
    run_command(main)
