"""Fan-out and join over files: a folder becomes its files, all of them are at work at once, and they become one answer.

    scan (map) -> read -> measure -> report (join)

`python -m obsdag.examples.files [FOLDER]` prints how many lines the Python files of the folder have (without one: of
obsdag itself), the longest three, and the files that could not be read: each of those fails alone, the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig

__all__ = ["count", "dag", "main"]

dag = DAG("files")


@dag.map
def scan(folder: Context) -> Iterator[dict[str, Any]]:
    """One child for each file, found when there is room for it: the tree may be as large as it likes."""
    for path in sorted(Path(folder["path"]).rglob("*.py")):
        yield {"path": path}


@dag.task(after=scan)
def read(file: Context) -> Context:
    """A plain function runs in a thread: several files are read at once."""
    file["text"] = file["path"].read_text(encoding="utf-8")
    return file


@dag.task(after=read)
async def measure(file: Context) -> Context:
    """Quick and without waiting: a coroutine function runs on the event loop."""
    file["lines"] = len(file.pop("text").splitlines())
    return file


@dag.join(after=measure, on_child_failure="skip")
async def report(folder: Context, files: Any) -> Context:
    """Called once, with the folder and all files that came through; `files.failed` are the others."""
    folder["lines"] = sum(file["lines"] for file in files)
    folder["longest"] = sorted(files, key=lambda file: -file["lines"])[:3]
    folder["unreadable"] = files.failed
    return folder


def count(path: Path) -> Context:
    """Runs the DAG over one folder; its context has `lines`, `longest` and `unreadable`."""
    result = Executor(dag, config=ExecutorConfig(context_worker_num=8)).run_sync({"path": path})
    return result[0]


def main(arguments: list[str]) -> None:
    """Prints the answer for the folder that is named first."""
    path = Path(arguments[0]) if arguments else Path(__file__).parent.parent
    folder = count(path)
    print(f"{folder['lines']} lines below {path.name}")
    for file in folder["longest"]:
        print(f"{file['lines']:7} {file['path'].relative_to(path)}")
    for file in folder["unreadable"]:
        print(f"unreadable: {file['path'].relative_to(path)}: {file.error_info.exception}")


if __name__ == "__main__":
    main(sys.argv[1:])
