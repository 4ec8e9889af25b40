"""`obsdag top` as people run it: against a real ops server, on a terminal and without one."""

from __future__ import annotations

import asyncio
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from obsdag import Context, ServeExecutor
from obsdag.ops import OpsServer, start_ops_server
from tests.cli.command import command, on_terminal
from tests.ops.scenes import orders, steady
from tests.ops.web import goes_on, one_task, service

TOKEN = "correct-horse"


async def _top(ops: OpsServer, *arguments: str, folder: Path, **env: str) -> str:
    done = await asyncio.to_thread(command, "top", "-n", "0.6", *arguments, ops.url, folder=folder, **env)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


async def test_once_and_without_a_terminal_it_prints_and_ends(tmp_path: Path) -> None:
    async with steady(orders()) as executor:
        with start_ops_server(executor, port=0) as ops:
            await executor.submit({"stuck": 60.0, "lines": 3}, id="order-4711")
            failed = await executor.submit({"fail": "reset by peer", "lines": 1})
            await asyncio.wait_for(failed._ended(), 30)
            printed = await _top(ops, "--once", folder=tmp_path)

    assert printed.startswith("shop / orders  accepting\n")
    assert re.search(r"failed within a minute, the last at score_risk: ConnectionError", printed)
    assert re.search(r"^reserve_stock +[1-9]", printed, re.MULTILINE)
    assert re.search(r"all_lines  2 of 3 arrived; 1 at reserve_stock  order-4711$", printed, re.MULTILINE)
    assert re.search(r"in \d", printed), "rates are told, not dashes"
    assert "\x1b" not in printed


async def test_what_others_wrote_sends_the_terminal_no_commands(tmp_path: Path) -> None:
    async def raises(ctx: Context) -> Context:
        raise ValueError("\x1b]0;owned\x07 [bold red]markup[/] \u202e")

    executor = service(one_task(raises, name="[blink]task"))
    with start_ops_server(executor, port=0) as ops:
        async with executor:
            ticket = await executor.submit({}, id="\x1b[2Jid")
            await asyncio.wait_for(ticket._ended(), 10)
            printed = await _top(ops, "--once", folder=tmp_path)
            status, seen = await asyncio.to_thread(
                on_terminal, "top", ops.url, folder=tmp_path, columns=200, keys=b"q", when=b"FAILURES"
            )

    assert status == 0
    for text in (printed, seen):
        assert "\x1b]0;" not in text
        assert "\u202e" not in text
        assert r"\x1b[2Jid" in text
        assert r"\x1b]0;owned\x07 [bold red]markup[/] \u202e" in text
        assert "[blink]task" in text


async def test_on_a_terminal_it_goes_on_until_q_and_leaves_the_screen_as_it_was(tmp_path: Path) -> None:
    async with steady(orders()) as executor:
        other = ServeExecutor(one_task(goes_on), config=executor.config)
        with start_ops_server(executor, other, port=0) as ops:
            status, seen = await asyncio.to_thread(
                on_terminal,
                "top",
                "-n",
                "0.3",
                ops.url,
                folder=tmp_path,
                columns=120,
                keys=b"nsq",
                when=b"reserve_stock",
            )

    assert status == 0
    assert "\x1b[?1049h" in seen
    assert seen.rindex("\x1b[?1049l") > seen.rindex("\x1b[?1049h")
    assert "(1 of 2, n: next)" in seen


def test_mistakes_are_told_with_the_way_out(tmp_path: Path) -> None:
    executor = service(one_task(goes_on))
    with (
        start_ops_server(executor, port=0, token=TOKEN) as ops,
        start_ops_server(port=0, registry=CollectorRegistry()) as empty,
        _other_server() as elsewhere,
    ):
        told = {
            url: command("top", "--once", *options, url, folder=tmp_path, **env)
            for url, options, env in (
                (ops.url, [], {}),
                (ops.url + "/", [], {"OPS_TOKEN": "wrong-token"}),
                (ops.url.replace("127.0.0.1", "127.0.0.2"), [], {}),
                ("ftp://127.0.0.1", [], {}),
                ("http://127.0.0.1:notaport", [], {}),
                (empty.url, [], {}),
                (elsewhere, [], {}),
                (ops.url + "//", ["--dag", "nothing"], {"OPS_TOKEN": TOKEN}),
                (ops.url + "///", ["-n", "0"], {"OPS_TOKEN": TOKEN}),
            )
        }
    closed = command("top", "--once", ops.url, folder=tmp_path)

    assert {done.returncode for done in [*told.values(), closed]} == {2}
    assert all(done.stderr.count("\n") == 1 for done in told.values())
    messages = [done.stderr for done in told.values()]
    for message, expected in zip(
        messages,
        (
            "answers 401: the right token is needed: set OPS_TOKEN",
            "answers 401",
            "does not answer",
            "is no http or https URL",
            "is no http or https URL",
            "shows no executor",
            "is not the ops server of an obsdag program",
            "no executor of a DAG 'nothing' there: orders",
            "--interval must be from 0.1 to 3600 seconds",
        ),
        strict=True,
    ):
        assert expected in message
    assert "does not answer: " in closed.stderr


def test_the_token_comes_from_the_environment(tmp_path: Path) -> None:
    with start_ops_server(service(one_task(goes_on)), port=0, token=TOKEN) as ops:
        done = command("top", "--once", "-n", "0.1", ops.url, folder=tmp_path, OPS_TOKEN=TOKEN)

    assert done.returncode == 0
    assert done.stdout.startswith("ops / orders  stopped")


@contextmanager
def _other_server() -> Iterator[str]:
    """Something else that speaks HTTP."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"hello": 1}')

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
