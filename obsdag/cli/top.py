"""`obsdag top URL`: what the live page shows, in a terminal.

It asks the ops server of a running program for `/api/state` once per interval. Everything that comes from there is
shown as text: a context id cannot send the terminal a command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from obsdag.cli.common import OK, CliError, one_line, shown

__all__ = ["add_command"]

_TOKEN: Final = "OPS_TOKEN"  # the name of the variable
_MOST_BYTES: Final = 64_000_000
_SORTS: Final = ("activity", "failed", "p95", "name")


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "top",
        help="watch a running program in the terminal",
        description="Shows what the executors of a running program do now, as its live page does.",
        epilog=f"keys:\n  q  quit\n  n  next executor\n  s  sort tasks by {', '.join(_SORTS)}\n\n"
        f"environment:\n  {_TOKEN}  the token of the ops server, where it has one",
    )
    parser.add_argument(
        "url", metavar="URL", nargs="?", default="http://127.0.0.1:9464", help="of the ops server; default: %(default)s"
    )
    parser.add_argument("-d", "--dag", help="the executor of this DAG; default: the first")
    parser.add_argument("-n", "--interval", metavar="SECONDS", type=float, default=1.0, help="default: 1")
    parser.add_argument("--once", action="store_true", help="print once and end; so it does where there is no terminal")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit status. Raises CliError."""
    try:
        from obsdag.cli.top_view import Screen
    except ImportError as error:
        raise CliError("this command needs the package rich: pip install 'obsdag[cli]'") from error
    if not 0.1 <= args.interval <= 3_600:
        raise CliError(f"--interval must be from 0.1 to 3600 seconds, not {args.interval:g}")
    ask = _Asking(args.url)
    screen = Screen(ask(), args.dag, sort=_SORTS[0])
    if args.once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        time.sleep(min(args.interval, 2.0))  # rates are told from the second look on
        screen.take(ask())
        screen.print(sys.stdout)
        return OK
    with _keys() as keys, screen.shown(sys.stdout):
        _watch(ask, screen, keys, args.interval)
    return OK


def _watch(ask: _Asking, screen: Any, keys: Any, interval_s: float) -> None:
    due = time.monotonic() + interval_s
    while True:
        key = keys(max(due - time.monotonic(), 0.0))
        if key in ("q", "Q", "\x03"):
            return
        if key == "n":
            screen.turn()
        elif key == "s":
            screen.sort = _SORTS[(_SORTS.index(screen.sort) + 1) % len(_SORTS)]
        if time.monotonic() >= due:
            try:
                screen.take(ask())
            except CliError as error:  # it may come back: what was seen last stays, with its age
                screen.lost = str(error)
            due = time.monotonic() + interval_s
        screen.draw()


class _Asking:
    """Asks one ops server for its state. Raises CliError, with the way out."""

    def __init__(self, url: str) -> None:
        parts = _parts(url)
        self._url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._headers = {"Accept": "application/json", "User-Agent": "obsdag-top"}
        token = os.environ.get(_TOKEN) or parts.password
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._opener = build_opener(ProxyHandler({}), _NoRedirect())

    def __call__(self) -> dict[str, Any]:
        try:
            with self._opener.open(Request(f"{self._url}/api/state", headers=self._headers), timeout=5.0) as answer:
                found = json.loads(answer.read(_MOST_BYTES))
        except HTTPError as error:
            with error:
                raise CliError(self._refusal(error.code)) from None
        except (URLError, OSError) as error:
            raise CliError(f"{self._url} does not answer: {one_line(getattr(error, 'reason', error))}") from None
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("executors"), list) or "columns" not in found:
            raise CliError(f"{self._url} is not the ops server of an obsdag program")
        if not found["executors"]:
            raise CliError(f"{self._url} shows no executor: give some to start_ops_server or create_app")
        return found

    def _refusal(self, status: int) -> str:
        hint = {
            401: f"the right token is needed: set {_TOKEN}",
            403: "it answers other machines only with a token",
            421: "the name in the URL is not among its allowed_hosts",
            404: "there is no ops server at this address; is it mounted below a path?",
        }
        return f"{self._url} answers {status}: {hint.get(status, 'see its log')}"


def _parts(url: str) -> SplitResult:
    with contextlib.suppress(ValueError):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    raise CliError(f"{shown(url)!r} is no http or https URL")


class _NoRedirect(HTTPRedirectHandler):
    """A token goes where it was meant to go, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """None: the redirect is an error."""
        return


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits some seconds for a key: the key, or "" for none. Afterwards the terminal is as it was."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def key(wait_s: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], wait_s)
        return os.read(descriptor, 1).decode(errors="ignore") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
