"""Runs the command line: `python -m bgjob`."""

import sys

from bgjob.cli import main

if __name__ == "__main__":
    sys.exit(main())
