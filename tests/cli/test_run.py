"""`obsdag run`, as a process: what it writes where, and its exit status."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import TIMEOUT_S, command, jsonl, lines, on_terminal, shell, start, wait_for

HINT = "see 'obsdag run --help'"


def _names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_lines_go_through_the_dag_from_standard_input_to_standard_output(folder: Path) -> None:
    done = command("run", "orders:dag", folder=folder, given='{"n": 1, "text": "é"}\n\n  \n{"n": 2}')

    assert done.returncode == 0
    assert lines(done.stdout) == [{"n": 1, "text": "é", "seen": True}, {"n": 2, "seen": True}]
    assert "2 outputs, 0 failed of stdin" in done.stderr


def test_what_tasks_and_workers_print_does_not_get_between_the_outputs(folder: Path) -> None:
    given = '{"n": 1}\n{"n": 2}\n'

    done = command("run", "orders.py:in_process", "--processes", "1", folder=folder, given=given)

    assert sorted(each["n"] for each in lines(done.stdout)) == [2, 4]
    assert done.stderr.count("a worker that prints") == 2
    assert command("run", "orders:dag", folder=folder, given=given).stderr.count("a task that prints") == 2


def test_from_file_to_file_with_failures_apart(folder: Path) -> None:
    source = jsonl(folder / "in.jsonl", {"n": 1}, {"n": 2, "fail": True}, {"n": 3, "odd": True}, {"n": 4})

    done = command(
        *("run", "orders:dag", "--input", "in.jsonl", "--output", "out.jsonl", "--failures", "failed.jsonl"),
        folder=folder,
    )

    assert done.returncode == 1
    assert lines((folder / "out.jsonl").read_text()) == [{"n": 1, "seen": True}, {"n": 4, "seen": True}]
    failed, odd = lines((folder / "failed.jsonl").read_text())
    assert failed == {
        "context": "in.jsonl:2",
        "root": "in.jsonl:2",
        "outcome": "failed",
        "task": "look",
        "attempts": 1,
        "error_type": "ValueError",
        "error": "nobody orders\nseven",
        "data": {"n": 2, "fail": True},
    }
    assert (odd["context"], odd["outcome"]) == ("in.jsonl:3", "unwritable")
    assert odd["error"] == "JSON cannot write this output: the value at odd.deep[1] is of type set"
    assert odd["data"]["n"] == 3
    assert "2 outputs, 2 failed" in done.stderr
    assert _names(folder) == {"orders.py", source.name, "out.jsonl", "failed.jsonl"}


def test_failures_are_told_on_standard_error_where_no_file_is_for_them(folder: Path) -> None:
    given = "".join(f"{json.dumps({'n': n, 'fail': True})}\n" for n in range(30))

    done = command("run", "orders:dag", folder=folder, given=given)

    told = [line for line in done.stderr.splitlines() if "failed at 'look'" in line]
    assert done.returncode == 1
    assert told[0] == "obsdag run: stdin:1 failed at 'look': ValueError: nobody orders seven"
    assert len(told) == 10
    assert "--failures FILE keeps them all" in done.stderr


def test_stalled_contexts_count_as_failed(folder: Path) -> None:
    arguments = ("run", "orders:stalling", "--set", "worker_idle_times=0", "--failures", "failed.jsonl")
    done = command(*arguments, folder=folder, given="{}\n")

    (stalled,) = lines((folder / "failed.jsonl").read_text())
    assert done.returncode == 1
    assert (stalled["outcome"], stalled["task"]) == ("stalled", "both")
    assert (stalled["context"], stalled["error"]) == ("stdin:1", "it is frozen and nobody thaws it")


@pytest.mark.parametrize("value", ["float('nan')", "{(1, 2): 3}", "b'x'", "object()"])
def test_an_output_that_json_cannot_write_is_a_failure_and_no_crash(folder: Path, value: str) -> None:
    (folder / "odd.py").write_text(
        "from obsdag import DAG\ndag = DAG()\n@dag.task\nasync def make(ctx):\n"
        f"    if ctx['odd']:\n        ctx['value'] = {value}\n    return ctx\n"
    )

    done = command("run", "odd:dag", folder=folder, given='{"odd": true}\n{"odd": false}\n')

    assert done.returncode == 1
    assert lines(done.stdout) == [{"odd": False}]
    assert "stdin:1 unwritable at 'output': TypeError: JSON cannot write this output: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_value_that_contains_itself_is_found(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "from obsdag import DAG\ndag = DAG()\n@dag.task\nasync def make(ctx):\n"
        "    ctx['me'] = []\n    ctx['me'].append(ctx['me'])\n    return ctx\n"
    )

    done = command("run", "odd:dag", "--failures", "failed.jsonl", folder=folder, given="{}\n")

    (failed,) = lines((folder / "failed.jsonl").read_text())
    assert done.returncode == 1
    assert failed["error"].endswith("contains itself")


def test_text_that_is_no_unicode_survives(folder: Path) -> None:
    done = command("run", "orders:dag", folder=folder, given='{"name": "\\udcff \\u00e9"}\n')

    assert done.returncode == 0
    assert lines(done.stdout) == [{"name": "\udcff é", "seen": True}]


# --- settings


def test_settings_come_from_file_variable_and_option_and_the_later_wins(folder: Path) -> None:
    (folder / "show.py").write_text(
        "from obsdag import DAG\ndag = DAG()\n@dag.task\nasync def show(ctx):\n"
        "    config = ctx._run.config\n"
        "    ctx['got'] = [config.context_worker_num, config.task_worker_num, config.seed, config.deadline]\n"
        "    return ctx\n"
    )
    table = "[executor]\ncontext_worker_num = 2\ntask_worker_num = 2\nseed = 2\ndeadline = 20\n"
    (folder / "conf.toml").write_text(table)

    done = command(
        *("run", "show:dag", "--config", "conf.toml", "--set", "seed=4", "--workers", "3", "--workers", "4"),
        folder=folder,
        given="{}\n",
        OBSDAG_TASK_WORKER_NUM="3",
        OBSDAG_SEED="3",
    )

    assert lines(done.stdout) == [{"got": [4, 3, 4, 20]}]


def test_a_toml_file_is_a_dag_with_its_settings(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "steps.py").write_text(
        "async def step(ctx):\n    ctx['workers'] = ctx._run.config.context_worker_num\n    return ctx\n"
    )
    (inner / "dag.toml").write_text('[executor]\ncontext_worker_num = 7\n[tasks.step]\nfunction = "steps:step"\n')

    done = command("run", "inner/dag.toml", folder=folder, given="{}\n")

    assert lines(done.stdout) == [{"workers": 7}]


def test_log_lines_are_shown_when_asked_for(folder: Path) -> None:
    quiet = command("run", "orders:dag", folder=folder, given='{"fail": true}\n')
    loud = command("run", "orders:dag", "--log-level", "debug", folder=folder, given='{"fail": true}\n')

    assert "execution.started" not in quiet.stderr
    assert "execution.started" in loud.stderr


def test_quiet_says_nothing_but_failures(folder: Path) -> None:
    done = command("run", "orders.py:in_process", "--processes", "1", "-q", "-o", "out.jsonl", folder=folder)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "out.jsonl").read_text() == ""


# --- bad input: one line, status 2, no file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["orders:dag", "--wrokers", "3"], f"run: unknown argument '--wrokers'; did you mean --workers? {HINT}"),
        (["orders:dag", "--workers", "0"], "--workers must be a whole number from 1 to 100,000, not '0'"),
        (["orders:dag", "--workers", "99999999"], "--workers must be a whole number from 1 to 100,000, not '99999999'"),
        (["orders:dag", "--workers"], f"argument --workers: expected one argument; {HINT}"),
        (["orders:dag", "--deadline", "soon"], "--deadline must be a number of seconds > 0, or None "),
        (["orders:dag", "--set", "deadline=0"], "--set deadline must be a number of seconds > 0, or None "),
        (["orders:dag", "--set", "dedline=1"], "--set: there is no setting 'dedline'; did you mean 'deadline'?"),
        (["orders:dag", "--set", "deadline"], "--set 'deadline' sets nothing: write NAME=VALUE, "),
        (["orders:dag", "--set", "telemetry=1"], "--set: there is no setting 'telemetry'; the settings are "),
        (["orders:dag", "--config", "no.toml"], "--config no.toml cannot be read: No such file or directory"),
        (["orders:dag", "--config", "in.jsonl"], "in.jsonl is not TOML: "),
        (["orders:dag", "--config", "bad.toml"], "bad.toml [executor] has no setting 'workers'; did you mean "),
        (["orders:dag", "--log-level", "loud"], "argument --log-level: invalid choice: 'loud'"),
        (["orders:dag", "-i", "no.jsonl"], "--input 'no.jsonl' cannot be read: No such file or directory"),
        (["orders:dag", "-i", "."], "--input '.' is a folder: name a file"),
        (["orders:dag", "-i", "in.jsonl", "-o", "no/out.jsonl"], "--output 'no/out.jsonl': there is no folder "),
        (["orders:dag", "-i", "in.jsonl", "-o", "."], "--output '.' is a folder: name a file in it"),
        (["orders:dag", "-i", "in.jsonl", "-o", "./in.jsonl"], "--input and --output are the same file: name another"),
        (["orders:dag", "-i", "in.jsonl", "-o", "link.jsonl"], "--input and --output are the same file: name another"),
        (["orders:dag", "-i", "in.jsonl", "-o", "x", "--failures", "./x"], "--output and --failures are the same file"),
        (["orders:dag", "-i", "in.jsonl", "-o", "out.jsonl", "--failures", "no/x"], "--failures 'no/x': there is no "),
        (["orders", "-i", "in.jsonl"], "'orders' names no DAG: write module:dag, "),
        (["ordrs:dag", "-i", "in.jsonl"], "there is no module 'ordrs' in "),
        (["no.py:dag", "-i", "in.jsonl"], "there is no file 'no.py'"),
        (["no.toml", "-i", "in.jsonl"], "there is no file 'no.toml'"),
        (["bad.toml", "-i", "in.jsonl"], "bad.toml [executor] has no setting 'workers'; did you mean "),
        (["mistakes.toml", "-i", "in.jsonl"], "mistakes.toml: tasks.a.function: "),
        (["orders:dga", "-i", "in.jsonl"], "'orders' has no attribute 'dga'; its DAGs: dag"),
        (["orders:look", "-i", "in.jsonl"], "'orders:look' is the task 'look': name the DAG that it is in"),
        (["orders:number", "-i", "in.jsonl"], "'orders:number' is of type int: it must be a DAG, or a function "),
        (["orders:needs", "-i", "in.jsonl"], "'orders:needs' takes parameters (thing): name a function without any"),
        (["orders:nothing", "-i", "in.jsonl"], "'orders:nothing' gave something of type NoneType when called: "),
        (["orders:coroutine", "-i", "in.jsonl"], "'orders:coroutine' is a coroutine function: it must be "),
        (["orders:raises", "-i", "in.jsonl"], "'orders:raises' could not make its DAG: RuntimeError: no database ("),
        (["orders:broken", "-i", "in.jsonl"], "the DAG 'orders:broken' cannot be built: "),
        (["orders:in_process", "-i", "in.jsonl"], "orders:in_process: task 'double' runs in a process: set "),
        (["unfit:dag", "-i", "in.jsonl"], "unfit cannot be imported: SyntaxError: invalid syntax ("),
        (["needy:dag", "-i", "in.jsonl"], "needy cannot be imported: ModuleNotFoundError: No module named 'nowhere' ("),
        (["leaves:dag", "-i", "in.jsonl"], "leaves cannot be imported: SystemExit: 3 ("),
        (["shadow/queue.py:dag", "-i", "in.jsonl"], "'shadow/queue.py' has the name of another module, "),
        (["a.b.py:dag", "-i", "in.jsonl"], "'a.b.py' cannot be imported, because of the dot in its name: rename it"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line_and_leaves_nothing(folder: Path, arguments: list[str], message: str) -> None:
    jsonl(folder / "in.jsonl", {"n": 1})
    (folder / "link.jsonl").symlink_to("in.jsonl")
    (folder / "bad.toml").write_text("[executor]\nworkers = 2\n")
    (folder / "mistakes.toml").write_text('[tasks.a]\nfunction = "orders:nobody"\n')
    (folder / "unfit.py").write_text("dag = = 1\n")
    (folder / "needy.py").write_text("import nowhere\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "shadow").mkdir()
    (folder / "shadow" / "queue.py").write_text("dag = 1\n")
    (folder / "a.b.py").write_text("dag = 1\n")
    before = _names(folder)
    more = [] if "-o" in arguments else ["-o", "out.jsonl"]

    done = command("run", *arguments, *more, folder=folder)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    start, _, told = done.stderr.partition("error: ")
    assert start in ("obsdag: ", "obsdag run: ")
    assert told.startswith(message)
    assert _names(folder) == before
    assert (folder / "in.jsonl").read_text() == '{"n": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": 2', "in.jsonl:3: not JSON: Expecting ',' delimiter at column 8"),
        (b"[1, 2]", 'in.jsonl:3: an array, but each line must be an object such as {"key": 1}'),
        (b"null", 'in.jsonl:3: null, but each line must be an object such as {"key": 1}'),
        (b'{"n": NaN}', "in.jsonl:3: not JSON: NaN is no JSON number; write null or a text"),
        (b'{"n": "\xff"}', "in.jsonl:3: not UTF-8: invalid start byte at byte 8"),
        (b'{"n": ' + b"[" * 100_000 + b"}", "in.jsonl:3: nested too deep to be read"),
        (b'{"n": ' + b"9" * 5000 + b"}", "in.jsonl:3: Exceeds the limit (4300 digits) for integer string conversion"),
    ],
)
def test_a_broken_line_is_told_with_its_place_and_changes_no_file(folder: Path, line: bytes, message: str) -> None:
    (folder / "in.jsonl").write_bytes(b'{"n": 1}\n\n' + line + b'\n{"n": 4}\n')
    (folder / "out.jsonl").write_text("as it was\n")
    before = _names(folder)

    done = command("run", "orders:dag", "-i", "in.jsonl", "-o", "out.jsonl", "--failures", "f.jsonl", folder=folder)

    assert done.returncode == 2
    (told,) = [line for line in done.stderr.splitlines() if line != "a task that prints"]
    assert told.startswith(f"obsdag run: error: {message}")
    assert (folder / "out.jsonl").read_text() == "as it was\n"
    assert _names(folder) == before


def test_a_byte_order_mark_and_a_line_longer_than_a_portion_are_read(folder: Path) -> None:
    (folder / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n{"long": "' + b"x" * 200_000 + b'"}')

    done = command("run", "orders:dag", "-i", "in.jsonl", folder=folder)

    assert [sorted(each) for each in lines(done.stdout)] == [["n", "seen"], ["long", "seen"]]


@pytest.mark.parametrize(
    ("given", "outputs"),
    [
        (b"", 0),
        (b"\n \r\n\n", 0),
        (b'{"n": 1}\r\n{"n": 2}\r\n', 2),
        (b'{"n": 1, "n": 2}', 1),
        (b'{"n": "\xe2\x80\xa8"}', 1),
    ],
    ids=["empty", "blank", "crlf", "same key twice", "a line separator in a text"],
)
def test_odd_input_that_is_no_mistake(folder: Path, given: bytes, outputs: int) -> None:
    (folder / "in.jsonl").write_bytes(given)

    done = command("run", "orders:dag", "-q", "-i", "in.jsonl", "-o", "out.jsonl", folder=folder)

    assert done.returncode == 0
    assert len(lines((folder / "out.jsonl").read_text())) == outputs


# --- streams that the caller closed


@pytest.mark.parametrize(
    ("words", "closed", "status", "told"),
    [
        ("orders:dag", "<&-", 2, "standard input cannot be read: Bad file descriptor; give --input FILE"),
        ("orders:dag -i in.jsonl", ">&-", 2, "standard output is closed: give --output FILE"),
        ("orders:dag -i in.jsonl -o out.jsonl", "<&- >&-", 0, "1 output, 0 failed of in.jsonl in"),
        ("orders:dag -i in.jsonl -o out.jsonl", "<&- >&- 2>&-", 0, ""),
        ("orders:dag -i no.jsonl -o out.jsonl", "<&- >&- 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed(folder: Path, words: str, closed: str, status: int, told: str) -> None:
    jsonl(folder / "in.jsonl", {"n": 1})

    done = shell(f"run {words} {closed}", folder)

    assert done.returncode == status
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert told in done.stderr
    if status == 0:  # what the task prints has gone nowhere near it
        assert lines((folder / "out.jsonl").read_text()) == [{"n": 1, "seen": True}]


# --- files


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_stays_a_link(folder: Path) -> None:
    target = folder / "real.jsonl"
    target.write_text("old\n")
    target.chmod(0o640)
    (folder / "out.jsonl").symlink_to("real.jsonl")

    done = command("run", "orders:dag", "-o", "out.jsonl", folder=folder, given='{"n": 1}\n')

    assert done.returncode == 0
    assert (folder / "out.jsonl").is_symlink()
    assert lines(target.read_text()) == [{"n": 1, "seen": True}]
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_devices_are_written_to_and_not_replaced(folder: Path) -> None:
    done = command("run", "orders:dag", "-o", "/dev/null", folder=folder, given='{"n": 1}\n')

    assert done.returncode == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk_is_told_in_one_line(folder: Path) -> None:
    done = command("run", "orders:dag", "-o", "/dev/full", folder=folder, given='{"n": 1}\n')

    assert done.returncode == 2
    assert "obsdag run: error: /dev/full cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_ends_the_run_quietly(folder: Path) -> None:
    jsonl(folder / "in.jsonl", *({"n": n, "text": "x" * 100} for n in range(5000)))
    with start("run", "orders:dag", "-q", "-i", "in.jsonl", folder=folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read().replace(b"a task that prints\n", b"")

        assert (process.wait(TIMEOUT_S), told) == (141, b"")


# --- ending early


def test_outputs_come_while_the_input_is_still_open(folder: Path) -> None:
    with start("run", "orders:dag", "-q", folder=folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"n": 1}\n')
        process.stdin.flush()
        first = process.stdout.readline()
        rest, _ = process.communicate(b'{"n": 2}\n', timeout=TIMEOUT_S)

    assert json.loads(first)["n"] == 1
    assert [each["n"] for each in lines(rest.decode())] == [2]
    assert process.returncode == 0


@contextmanager
def _hanging(folder: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run whose third context hangs, when all have begun."""
    jsonl(folder / "in.jsonl", {"n": 1}, {"n": 2}, {"hang": True}, {"n": 4})
    with start("run", "orders:dag", "-i", "in.jsonl", "--workers", "2", *more, folder=folder) as process:
        if "-o" in more:  # what tasks print stays on standard output
            assert process.stdout is not None
            for _ in range(4):
                process.stdout.readline()
        else:
            wait_for(process, b"a task that prints", 4)
        yield process


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_E9_a_signal_ends_the_run_and_keeps_whole_lines_beside_the_target(
    folder: Path, number: int, status: int, word: str
) -> None:
    (folder / "out.jsonl").write_text("as it was\n")
    with _hanging(folder, "-o", "out.jsonl") as process:
        process.send_signal(number)
        _, told = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == status
    assert f"obsdag run: {word} after ".encode() in told
    assert b"what there is so far is in out.jsonl.partial" in told
    assert b"Traceback" not in told
    assert (folder / "out.jsonl").read_text() == "as it was\n"
    assert {each["n"] for each in lines((folder / "out.jsonl.partial").read_text())} <= {1, 2, 4}
    assert _names(folder) == {"orders.py", "in.jsonl", "out.jsonl", "out.jsonl.partial"}


def test_E9_an_interrupted_run_has_written_whole_lines_to_standard_output(folder: Path) -> None:
    with _hanging(folder) as process:
        process.send_signal(signal.SIGINT)
        written, told = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 130
    assert {each["n"] for each in lines(written.decode())} <= {1, 2, 4}
    assert b"obsdag run: interrupted after " in told


def test_E4_a_context_that_hangs_does_not_keep_others_from_coming_in_through_a_pipe(folder: Path) -> None:
    with start("run", "orders:dag", "--workers", "2", folder=folder) as process:
        assert process.stdin is not None
        process.stdin.write(b'{"n": 1}\n{"hang": true}\n{"n": 3}\n{"n": 4}\n')
        process.stdin.flush()
        wait_for(process, b"a task that prints", 4)
        process.send_signal(signal.SIGINT)

        assert process.wait(TIMEOUT_S) == 130


def test_E9_an_interruption_ends_a_run_that_waits_for_input(folder: Path) -> None:
    with start("run", "orders:dag", "--log-level", "info", folder=folder) as process:
        wait_for(process, b"run.started")
        process.send_signal(signal.SIGINT)

        assert process.wait(TIMEOUT_S) == 130


def test_E9_an_interruption_ends_a_run_whose_reader_does_not_read(folder: Path) -> None:
    # More than the pipe takes, so that the writer is stuck when the last context has begun.
    jsonl(folder / "in.jsonl", *({"n": n, "text": "x" * 1000} for n in range(500)))
    with start("run", "orders:dag", "-i", "in.jsonl", folder=folder) as process:
        wait_for(process, b"a task that prints", 500)
        process.send_signal(signal.SIGINT)

        assert process.wait(TIMEOUT_S) == 130


def test_a_deadline_ends_the_run_and_keeps_what_there_is(folder: Path) -> None:
    jsonl(folder / "in.jsonl", {"n": 1}, {"hang": True})

    arguments = ("run", "orders:dag", "-i", "in.jsonl", "-o", "out.jsonl", "--workers", "2", "--deadline", "0.5")
    done = command(*arguments, folder=folder)

    assert done.returncode == 1
    assert "the run did not finish within its deadline of 0.5 s; what there is so far is in " in done.stderr
    assert lines((folder / "out.jsonl.partial").read_text()) == [{"n": 1, "seen": True}]
    assert not (folder / "out.jsonl").exists()


def test_on_failure_raise_ends_the_run_and_keeps_what_there_is(folder: Path) -> None:
    jsonl(folder / "in.jsonl", {"n": 1}, {"fail": True}, {"n": 3})

    done = command("run", "orders:dag", "-i", "in.jsonl", "-o", "out.jsonl", "--set", "on_failure=raise", folder=folder)

    assert done.returncode == 1
    assert "context 'in.jsonl:2' failed at task 'look' after 1 attempt(s): ValueError: nobody " in done.stderr
    assert not (folder / "out.jsonl").exists()
    assert (folder / "out.jsonl.partial").exists()


# --- terminals


def test_a_terminal_gets_a_bar_that_goes_away_and_a_last_line(folder: Path) -> None:
    pytest.importorskip("rich")
    jsonl(folder / "in.jsonl", *({"n": n} for n in range(50)))
    arguments = ("run", "orders:dag", "-i", "in.jsonl", "-o", "out.jsonl")

    status, seen = on_terminal(*arguments, folder=folder, columns=80)

    assert status == 0
    assert "\x1b[?25l" in seen  # the cursor is hidden while the bar is drawn,
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # and shown again
    assert "50 outputs, 0 failed of in.jsonl in " in seen
    assert len(lines((folder / "out.jsonl").read_text())) == 50


def test_ctrl_c_on_a_terminal_ends_the_run_and_leaves_the_terminal_as_it_was(folder: Path) -> None:
    jsonl(folder / "in.jsonl", {"n": 1}, {"hang": True})
    arguments = ("run", "orders:dag", "-i", "in.jsonl", "-o", "out.jsonl", "--workers", "2")

    status, seen = on_terminal(*arguments, folder=folder, keys=b"\x03", when=b"1 out")

    assert status == 130
    assert "interrupted after 1 output, 1 context cancelled" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert "Traceback" not in seen


def test_without_rich_a_terminal_gets_plain_lines(folder: Path) -> None:
    (folder / "rich.py").write_text("raise ImportError('not installed')\n")
    jsonl(folder / "in.jsonl", {"n": 1})

    status, seen = on_terminal("run", "orders:dag", "-i", "in.jsonl", "-o", "out.jsonl", folder=folder)

    assert status == 0
    assert "\x1b[" not in seen
    assert "1 output, 0 failed of in.jsonl in " in seen
