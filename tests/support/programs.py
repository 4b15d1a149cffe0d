"""The server's programs, with an `initdb` that makes one data folder and then copies it."""

import os
import shlex
from pathlib import Path

from bgjob.ext._guardian import open_to_all

# EmbeddedServer calls it with -D and a folder, and always with the same further arguments.
INITDB = """#!/bin/sh
set -e
data=$2
shift 2
if [ ! -d {made} ]; then
    rm -rf {made}.new
    {initdb} -D {made}.new "$@"
    mv {made}.new {made}
fi
cp -R {made} "$data"
"""


def copying_initdb(bin_dir: Path, folder: Path) -> Path:
    """Make a `bin_dir` for EmbeddedServer in a folder that every user may enter; return it.

    An initdb takes half a second of a core, a copy of what it made a tenth. Where root's server
    could not run these programs, they are returned as they are.
    """
    if os.geteuid() == 0 and not open_to_all(bin_dir / "initdb"):
        return bin_dir
    programs, copies = folder / "bin", folder / "copies"
    programs.mkdir(mode=0o755)
    copies.mkdir()
    copies.chmod(0o1777)
    (programs / "postgres").symlink_to(bin_dir / "postgres")
    script = INITDB.format(
        initdb=shlex.quote(str(bin_dir / "initdb")), made=shlex.quote(str(copies / "data"))
    )
    (programs / "initdb").write_text(script)
    (programs / "initdb").chmod(0o755)
    return programs
