"""`--ray`, `--shards`, `--insecure`: where a command has its DAG run, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from obsdag.cli.common import CliError, one_line
from obsdag.errors import ConfigError, DeadlineExceeded, PoolError, RunFailed

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig
    from obsdag.executor import Executor
    from obsdag.graph import DAG
    from obsdag.ray import RayExecutor

__all__ = ["EARLY", "add_options", "make_executor", "refuse_options", "why_early"]

EARLY = (DeadlineExceeded, RunFailed, PoolError, ConfigError)
"""What ends a run: PoolError, of shards that cannot be had; ConfigError, of a cluster that cannot be joined."""


def why_early(error: Exception) -> str:
    """One line for what ended a run early. Raises CliError instead where it could not begin."""
    if isinstance(error, ConfigError):
        raise CliError(one_line(error)) from error
    return one_line(error.message if isinstance(error, RunFailed) else error)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to the parser of a command."""
    group = parser.add_argument_group("on a Ray cluster (pip install 'obsdag[ray]')")
    where = "run on the Ray cluster at ADDRESS, on the one that this machine is part of, or on one of its own"
    group.add_argument("--ray", metavar="ADDRESS|auto|local", help=where)
    group.add_argument("--shards", metavar="N", type=int, help="engines on the cluster (default 2)")
    insecure = "use a cluster that others can reach, though it asks for no token"
    group.add_argument("--insecure", action="store_true", help=insecure)


def refuse_options(args: argparse.Namespace) -> None:
    """Raises CliError for an option that means something only with `--ray`, if that is not there."""
    if args.ray is None and (args.shards is not None or args.insecure):
        raise CliError("--shards and --insecure are for a Ray cluster: say which one by --ray ADDRESS, or --ray local")


def make_executor(args: argparse.Namespace, dag: DAG, config: ExecutorConfig) -> Executor | RayExecutor:
    """The executor that the options ask for. Raises CliError, and what executors raise."""
    refuse_options(args)
    if args.ray is None:
        from obsdag.executor import Executor

        return Executor(dag, config=config)
    try:
        from obsdag.ray import RayExecutor
    except ImportError as error:
        raise CliError(f"--ray: {one_line(error)}") from error
    shards = 2 if args.shards is None else args.shards
    return RayExecutor(dag, config, shards=shards, address=args.ray, insecure=args.insecure)
