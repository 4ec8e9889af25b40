"""`obsdag demo --serve`: the service under steady load of `obsdag.examples.demo_service`, for dashboards to look at."""

from __future__ import annotations

import argparse
import math
from typing import Any, Final

from obsdag.cli.common import CliError
from obsdag.errors import ConfigError, JournalError

__all__ = ["OPTIONS", "add_options", "refuse_options", "serve"]

_OPTIONS: Final = {
    "host": ("HOST", "address to listen on; default: 127.0.0.1"),
    "port": ("PORT", "for /metrics and the live page; 0: any free one; default: 9464"),
    "control_port": ("PORT", "for POST /trouble/NAME; 0: any free one; default: 9465"),
    "token": ("TOKEN", "for the live page; needed if --host is open to other machines"),
    "jaeger_url": ("URL", "of a Jaeger's own page, for links to traces"),
    "journal": ("FILE", "keep orders that were accepted in there: they survive a crash"),
    "rate": ("N", "orders per second; default: 20"),
    "trouble": ("NAME=S,...", "trouble of its own accord, every S seconds, such as deadlock=60,broken_pool=300"),
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


OPTIONS: Final = tuple(map(_option, _OPTIONS))
"""The options of the service, beside `--serve`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to the parser of `obsdag demo`."""
    group = parser.add_argument_group("service")
    group.add_argument(
        "--serve",
        action="store_true",
        help="instead of the census: a service under steady load with /metrics and a live page, until it is"
        " interrupted; traces go to OTEL_EXPORTER_OTLP_ENDPOINT if that is set",
    )
    for name, (metavar, text) in _OPTIONS.items():
        group.add_argument(_option(name), metavar=metavar, help=text)


def refuse_options(args: argparse.Namespace) -> None:
    """Raises CliError for an option that means something only with `--serve`."""
    for name in _OPTIONS:
        if getattr(args, name) is not None:
            raise CliError(f"{_option(name)} goes with --serve only")


def serve(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; the exit status. Raises CliError."""
    from obsdag.examples.demo_service import main

    if args.settings or any((args.config, args.path, args.out, args.quiet, args.ray, args.shards, args.insecure)):
        raise CliError(f"--serve goes with {', '.join(OPTIONS)} only")
    try:
        return main(_options(args))
    except ConfigError as error:
        raise CliError(str(error)) from error
    except (JournalError, ImportError) as error:
        raise CliError(str(error)) from error
    except OSError as error:
        raise CliError(f"cannot listen: {error.strerror or error}") from error


def _options(args: argparse.Namespace) -> Any:
    from obsdag.examples.demo_service import Options, trouble_periods

    given: dict[str, Any] = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    try:
        for name in ("port", "control_port"):
            if name in given:
                given[name] = _port(_option(name), given[name])
        if "rate" in given:
            given["rate"] = _rate(given["rate"])
        if "trouble" in given:
            given["trouble"] = trouble_periods(given["trouble"])
    except ValueError as error:
        raise CliError(str(error)) from error
    return Options(**given)


def _port(option: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise ValueError(f"{option} must be a port, 0 to 65535, not {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1000:
        raise ValueError(f"--rate must be a number of orders per second, at most 1000, not {text!r}")
    return rate
