"""A census of the Python files below a folder: what `obsdag demo` runs.

    walk -> read -> syntax (process) -+
                 -> tokens (thread)  -+-> measure -> sort -> parsed     -+
                 -> digest (loop)    -+                   -> huge       -+-> register -> twins
                                                          -> unparsable (fails)

`walk` is a loop: it gives one new context for each file, as the run has room for it, so memory does not grow with the
tree. What is wrong with a file fails its context and no other: `EXPECTED` lists what may be. `Summary` adds up what
comes out.
"""

from __future__ import annotations

import ast
import hashlib
import heapq
import io
import os
import stat
import tokenize
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from obsdag.context import Context
from obsdag.graph import DAG
from obsdag.tasks.retry import Exponential

__all__ = [
    "EXPECTED",
    "FLAKY_ONE_IN",
    "HUGE_BYTES",
    "LEFT_OUT",
    "Finding",
    "Hiccup",
    "Summary",
    "Undecodable",
    "Unparsable",
    "Unreadable",
    "census",
    "find_sources",
    "is_flaky",
]

HUGE_BYTES: Final = 256 * 1024
FLAKY_ONE_IN: Final = 16
_BATCH: Final = 8
LEFT_OUT: Final = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
"""Folders that are not looked into, as are hidden ones."""


class Finding(Exception):
    """Something is wrong with a file; that is a result of the census, not a mistake of the program."""


class Unreadable(Finding):
    """The file cannot be opened or read."""


class Undecodable(Finding):
    """The file's bytes are not text in the encoding that it declares."""


class Unparsable(Finding):
    """The file is not Python of this interpreter's version."""


EXPECTED: Final[tuple[type[Finding], ...]] = (Unparsable, Undecodable, Unreadable)
"""The failures that a tree of real files may cause. Any other is a bug."""


class Hiccup(Exception):
    """What `register` raises on purpose, and what it is tried again for."""


def find_sources(folder: str) -> Iterator[str]:
    """Paths relative to `folder` of its .py files, sorted within each folder; links to folders are not followed.

    What is neither a file nor a link (a pipe, a device) is left out: opening it could wait for ever.
    """
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in LEFT_OUT)
        for name in sorted(files):
            path = os.path.join(where, name)
            if name.endswith(".py") and _may_be_read(path):
                yield os.path.relpath(path, folder)


def _may_be_read(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True  # a broken or circular link: reading it says what is wrong


def walk(ctx: Context) -> Iterator[list[Context]]:
    """One new context for each file below ctx["folder"], a few at a time: changing threads costs more than a file."""
    batch: list[Context] = []
    for path in find_sources(ctx["folder"]):
        file = ctx.create(name=_readable(path))
        file.update(folder=ctx["folder"], path=path)
        batch.append(file)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _readable(path: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in path)


def read(ctx: Context) -> Context:
    """The file's bytes, into ctx["source"]. Raises Unreadable, Undecodable."""
    try:
        source = Path(ctx["folder"], ctx["path"]).read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        source.decode(encoding)
    except (SyntaxError, ValueError, LookupError) as error:
        raise Undecodable(str(error)) from error
    ctx.update(source=source, bytes=len(source), encoding=encoding)
    return ctx


def syntax(ctx: Context) -> Context:
    """What the syntax tree says; in a worker process, since parsing is the most work."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes and the like in other people's code
            tree = ast.parse(ctx["source"])
    except SyntaxError as error:
        ctx["mistake"] = f"line {error.lineno}: {error.msg}"
        return ctx
    except (ValueError, MemoryError, RecursionError) as error:
        ctx["mistake"] = f"{type(error).__name__}: {error}"
        return ctx
    ctx.update(_counted(tree))
    return ctx


def _counted(tree: ast.Module) -> dict[str, Any]:
    functions = classes = 0
    longest: tuple[int, str] = (0, "")
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions += 1
            longest = max(longest, ((node.end_lineno or node.lineno) - node.lineno + 1, node.name))
        elif isinstance(node, ast.ClassDef):
            classes += 1
        elif isinstance(node, ast.Import):
            imports.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.add(node.module.partition(".")[0])
    return {"functions": functions, "classes": classes, "imports": sorted(imports), "longest": list(longest)}


_NO_CODE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
)


def tokens(ctx: Context) -> Context:
    """Tokens, and lines with code and with comments; in a thread. Up to where the file stops being Python."""
    number = 0
    code: set[int] = set()
    comments: set[int] = set()
    try:
        for token in tokenize.tokenize(io.BytesIO(ctx["source"]).readline):
            number += 1
            if token.type == tokenize.COMMENT:
                comments.add(token.start[0])
            elif token.type not in _NO_CODE:
                code.update(range(token.start[0], token.end[0] + 1))
    except (tokenize.TokenError, SyntaxError):
        pass  # `syntax` says what is wrong
    ctx.update(tokens=number, code_lines=len(code), comment_lines=len(comments))
    return ctx


async def digest(ctx: Context) -> Context:
    """The SHA-256 of the file's bytes; on the event loop, since it takes microseconds."""
    ctx["digest"] = hashlib.sha256(ctx["source"]).hexdigest()
    return ctx


async def measure(ctx: Context) -> Context:
    """The three branches come together; the source is not needed any more."""
    source = ctx.pop("source")
    ctx["lines"] = source.count(b"\n") + (not source.endswith(b"\n") and bool(source))
    ctx["comment_share"] = round(ctx["comment_lines"] / ctx["lines"], 4) if ctx["lines"] else 0.0
    return ctx


def sort(ctx: Context) -> str:
    """Which way the file goes."""
    if "mistake" in ctx:
        return "unparsable"
    return "huge" if ctx["bytes"] >= HUGE_BYTES else "parsed"


async def parsed(ctx: Context) -> Context:
    """An ordinary file."""
    ctx["verdict"] = "parsed"
    return ctx


async def huge(ctx: Context) -> Context:
    """A file that is counted, but whose imports are not listed."""
    ctx["verdict"] = "huge"
    ctx["imports"] = []
    return ctx


async def unparsable(ctx: Context) -> Context:
    """Fails the context, with the place in the file."""
    raise Unparsable(ctx["mistake"])


def is_flaky(digest: str) -> bool:
    """Whether `register` stumbles over a file: one in `FLAKY_ONE_IN`, by its content, so always over the same."""
    return int(digest[:8], 16) % FLAKY_ONE_IN == 0


async def register(ctx: Context) -> Context:
    """Stands for a service that is not always there: its first attempt fails on purpose for some files (`is_flaky`)."""
    if ctx.attempt == 1 and is_flaky(ctx["digest"]):
        ctx["hiccup"] = True
        raise Hiccup(f"no answer about {ctx['digest'][:8]}")
    return ctx


def twins(ctx: Context) -> Generator[Context, Context, None]:
    """A stream: it remembers which contents it has seen, and marks files that are equal to an earlier one."""
    seen: dict[str, str] = {}
    while True:
        first = seen.setdefault(ctx["digest"], ctx["path"])
        if first != ctx["path"]:
            ctx["same_as"] = first
        ctx = yield ctx


def census() -> DAG:
    """The DAG; its input is a context with "folder", its outputs are files."""
    dag = DAG("census")
    dag.loop(walk)
    dag.task(read, after="walk")
    dag.task(syntax, after="read", kind="process")
    dag.task(tokens, after="read")
    dag.task(digest, after="read")
    dag.task(measure, after=["syntax", "tokens", "digest"])
    dag.router(sort, after="measure", kind="foreground_router", targets=["parsed", "huge", "unparsable"])
    dag.task(parsed, after="sort")
    dag.task(huge, after="sort")
    dag.task(unparsable, after="sort")
    again = Exponential(base=0.01, jitter=False)
    dag.task(register, after=["parsed", "huge", "unparsable"], retry_times=3, retry_interval=again, retry_on=Hiccup)
    dag.task(twins, after="register", kind="foreground_stream")
    return dag


class Summary:
    """What the outputs of a census add up to. `add` each of them; memory does not grow with their number."""

    def __init__(self) -> None:
        self.files = 0
        self.totals: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.imports: Counter[str] = Counter()
        self.hiccups = 0
        self.same = 0
        self._longest: list[tuple[int, str, str]] = []

    def add(self, file: Mapping[str, Any]) -> None:
        """Counts one file."""
        self.files += 1
        self.verdicts[file["verdict"]] += 1
        for name in ("bytes", "lines", "code_lines", "comment_lines", "tokens", "functions", "classes"):
            self.totals[name] += file[name]
        self.imports.update(file["imports"])
        self.hiccups += "hiccup" in file
        self.same += "same_as" in file
        lines, name = file["longest"]
        if lines:
            entry = (lines, name, file["path"])
            (heapq.heappushpop if len(self._longest) >= 3 else heapq.heappush)(self._longest, entry)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        longest = [
            {"function": name, "lines": lines, "file": path}
            for lines, name, path in sorted(self._longest, reverse=True)
        ]
        return {
            "files": self.files,
            **{name: self.totals[name] for name in sorted(self.totals)},
            "verdicts": dict(sorted(self.verdicts.items())),
            "most_imported": dict(self.imports.most_common(10)),
            "longest_functions": longest,
            "files_equal_to_another": self.same,
            "retried_on_purpose": self.hiccups,
        }
