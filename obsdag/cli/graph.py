"""`obsdag graph`: a DAG as a picture or as data."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from obsdag.cli.common import OK, output_descriptor
from obsdag.cli.files import LineSink

if TYPE_CHECKING:
    from obsdag.graph import DAG

__all__ = ["FORMATS", "add_command"]

FORMATS: Final[Mapping[str, Callable[[DAG, bool], str]]] = {
    "mermaid": lambda dag, internal: dag.to_mermaid(internal),
    "dot": lambda dag, internal: dag.to_dot(internal),
    "json": lambda dag, internal: json.dumps(dag.to_dict(internal), indent=2, ensure_ascii=False),
    "svg": lambda dag, internal: dag.to_svg(internal),
}


def add_command(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "graph",
        help="draw a DAG",
        description="Writes a DAG as Mermaid (for Markdown), Graphviz's dot, JSON (nodes and edges), or SVG.",
    )
    parser.add_argument("target", metavar="DAG", help="module:dag, path/to/file.py:dag, or a TOML file")
    parser.add_argument("-f", "--format", choices=FORMATS, default="mermaid", help="default: mermaid")
    parser.add_argument("-o", "--output", metavar="FILE", default="-", help="-, the default: standard output")
    parser.add_argument("--internal", action="store_true", help="with the source and sink that every DAG has")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit status. Raises CliError."""
    from obsdag.cli.target import load_dag

    with contextlib.ExitStack() as stack:
        output = stack.enter_context(output_descriptor()) if args.output == "-" else None
        dag = load_dag(args.target)
        text = FORMATS[args.format](dag, args.internal)
        sink = LineSink(None if args.output == "-" else args.output, "--output", output)
        stack.callback(sink.discard)
        sink.put(f"{text.rstrip()}\n".encode(errors="backslashreplace"))
        asyncio.run(sink.flush())
        sink.commit()
    return OK
