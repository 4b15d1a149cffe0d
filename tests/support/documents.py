"""Files of the project that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


DOCS = ROOT / "bgjob" / "docs"


SCRIPT = (DOCS / "privileges.sql").read_text("utf-8")
