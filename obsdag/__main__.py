"""`python -m obsdag`, and where the command `obsdag` begins: it loads the rest where Ctrl-C is told as everywhere."""

from __future__ import annotations

import sys

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> int:
    """The command `obsdag`; the exit status."""
    try:
        from obsdag.cli import main as command
    except KeyboardInterrupt:
        return _INTERRUPTED
    return command()


if __name__ == "__main__":
    sys.exit(main())
