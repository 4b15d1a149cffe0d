"""Write the sync text of the modules that have both colours.

Such a module has its async text, written by hand, then its sync text, made from it:

    # -- async ---------------------------------------------------------
    class AsyncDlq: ...

    # -- sync: made from the async text by .ci/colours.py; do not edit -
    class Dlq: ...

    # -- both colours --------------------------------------------------

A sync text ends there, or with its module. The rules below translate code, comments and
docstrings alike, one after the other. Two things are not translated:

- What the colours do in different ways is a function in each, outside these texts, such as
  `_until_async` and `_until`; the suffix goes, like every other.
- What only an async caller has to know is a paragraph of a docstring that begins in one of
  a few ways, and is left out.

    python .ci/colours.py            writes the modules
    python .ci/colours.py --check    shows what that would change, and fails if it is anything
"""

import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ASYNC = "# -- async -"

BOTH = re.compile(
    r"(?P<kept>^ *# -- async -.*?\n(?P<written>.*?)^ *# -- sync: .*?\n).*?"
    r"(?=^ *# -- both colours -|\Z)",
    re.DOTALL | re.MULTILINE,
)

RULES = [
    # Articles, before what follows them is gone.
    (r"\b([Aa])n(?=\s+[Aa]sync)", r"\1"),
    # Code.
    (r"\basync ", ""),
    (r"\bawait ", ""),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"__a(?=enter__|exit__)", "__"),
    (r"\basyncio\.sleep\b", "sleep"),
    (r"\basynccontextmanager\b", "contextmanager"),
    # Names.
    (r"\broute\.awaited\b", "route.handler"),
    (r"\basyncio\.current_task\b", "threading.get_ident"),
    (r"\basyncio\.Event\b", "threading.Event"),
    (r"\bhas_loop=True\b", "has_loop=False"),
    (r"\ba(?=assert_|drain\b|close\b)", ""),
    (r"Async(?=[A-Z])|(?<=[a-z])Async\b|_async(?=_|\b)", ""),
    # English. A sync call cannot be cancelled, and its caller has no event loop.
    (r"\n\n +(?:If the call is|If calls of|The caller's event loop).*(?:\n +[^\s\"].*)*", ""),
    (r"\bthe caller's event loop\b", "an event loop of its own"),
    (r"\ba cancellation\b", "a KeyboardInterrupt"),
    (r"\bon another thread\b", "on the calling thread"),
    (r"\bleft behind go on\b", "left behind are cancelled"),
    (r"\bany task\b", "any thread or signal handler"),
    (r"\bsafe to share between tasks\b", "thread-safe"),
    (r"\bSafe to share between tasks\b", "Thread-safe"),
]


def sync(text: str, used: set[str]) -> str:
    """Return the sync text for an async text, and add the patterns that it needed."""
    for pattern, replacement in RULES:
        text, count = re.subn(pattern, replacement, text)
        if count:
            used.add(pattern)
    return text


def formatted(source: str, path: Path) -> str:
    """Return a module's source as ruff formats it."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(path), "-"]
    return subprocess.run(  # noqa: S603
        command, input=source, stdout=subprocess.PIPE, encoding="utf-8", check=True, cwd=ROOT
    ).stdout


def main() -> int:
    """Write or check every module; return the exit status."""
    is_check = sys.argv[1:] == ["--check"]
    used: set[str] = set()
    status = 0
    for path in sorted(ROOT.glob("bgjob/**/*.py")):
        old, name = path.read_text("utf-8"), path.relative_to(ROOT)
        new, count = BOTH.subn(lambda both: both["kept"] + sync(both["written"], used), old)
        if count != old.count(ASYNC):
            print(f"{name}: an async text has no sync text")
            status = 1
        elif count and (new := formatted(new, path)) != old:
            if is_check:
                lines = old.splitlines(), new.splitlines()
                print(*difflib.unified_diff(*lines, str(name), "made", lineterm=""), sep="\n")
                status = 1
            else:
                path.write_text(new, "utf-8")
    for pattern, _ in RULES:
        if pattern not in used:
            print(f"no async text needs the rule {pattern}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
