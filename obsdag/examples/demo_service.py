"""A service under steady load, to look at: what `obsdag demo --serve` runs, and what the dashboards are proven on.

    engine "shop", DAG "orders", serving:

    receive -> screen -+-> price (thread)  -+-> number (stream) -> lines (map) -> pick -> assemble (join) -> deliver
                       +-> risk (process)  -+
                       +-> partner         -+

    engine "back-office", DAG "settlement", a run every few seconds:

    pages (loop) -> approve -> book

Part of the load is trouble of the ordinary kind, by the number of the order: slow prices, a partner that fails and is
asked again, a rate limit, orders that cannot be delivered, duplicates that are dropped. Extraordinary trouble is made
on demand (`POST /trouble/NAME`) or now and then (`--trouble deadlock=60,broken_pool=300`), by `TROUBLES`.

One port has /metrics and the live page. Another takes orders: `POST /trouble/NAME`, and `POST /alerts`, which logs what
an Alertmanager sends. Traces go where OTEL_EXPORTER_OTLP_ENDPOINT says, if it is set.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from obsdag.config import ExecutorConfig
from obsdag.context import Context
from obsdag.core.observer import Observer
from obsdag.core.records import Execution
from obsdag.errors import ContextFailedError, NoOutputError, ObsdagError, QueueFullError, ServeError
from obsdag.executor import Executor
from obsdag.graph import DAG
from obsdag.limits import ConcurrencyLimit, RateLimit
from obsdag.serve import ServeExecutor
from obsdag.tasks.detached import DetachedContext
from obsdag.tasks.retry import Exponential

if TYPE_CHECKING:
    from obsdag.telemetry import Telemetry

__all__ = [
    "TROUBLES",
    "DemoService",
    "Options",
    "PartnerDown",
    "Undeliverable",
    "controls",
    "main",
    "orders",
    "settlement",
    "trouble_periods",
]

TROUBLES: Final = {
    "deadlock": "a run of the back office ends with a stalled context",
    "broken_pool": "a worker process dies under its task",
    "drops": "an observer of the back office raises and is detached",
    "block": "five tasks keep the event loop, each for a second",
    "outage": "the partner answers nobody for a while",
    "restart": "a stream raises and is made anew",
    "reject": "submissions are turned away",
    "vanish": "a task drops what it should not",
}
"""What can be made to go wrong, by name."""

_LOG: Final = logging.getLogger("demo")
_TIMES: Final = {"outage": 400, "block": 5}
"""How often it happens when asked for once, if more than once: 400 attempts are some 13 s at the limit's rate."""


class PartnerDown(Exception):
    """The partner did not answer; asking again helps."""


class Undeliverable(Exception):
    """The order's address is wrong: nothing helps."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the service is started with. trouble: name -> seconds between two of its kind. rate: orders per second.

    settle_every_s: seconds between two runs of the back office. host: where it listens; port: for /metrics and the
    page; control_port: for orders to it; each 0 for any free port. token: for the page, which other machines see with
    one only. jaeger_url: where the page's links to traces lead. journal: a file that keeps accepted orders; "": none.
    """

    host: str = "127.0.0.1"
    port: int = 9464
    control_port: int = 9465
    token: str | None = None
    jaeger_url: str | None = None
    journal: str = ""
    rate: float = 20.0
    settle_every_s: float = 2.0
    trouble: dict[str, float] = field(default_factory=dict)


def trouble_periods(text: str) -> dict[str, float]:
    """`deadlock=60,block=120` as a mapping; ValueError that names what is wrong."""
    periods: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, every = part.partition("=")
        try:
            seconds = float(every)
        except ValueError:
            seconds = 0.0
        if name not in TROUBLES or not seconds > 0:
            raise ValueError(f"trouble {part!r} is not NAME=SECONDS with a name of {', '.join(TROUBLES)}")
        periods[name] = seconds
    return periods


class Troubles:
    """What was asked for and has not happened yet; from any thread."""

    def __init__(self) -> None:
        self._due: Counter[str] = Counter()
        self._lock = threading.Lock()

    def ask(self, name: str, times: int = 1) -> None:
        """Asks for trouble. Raises KeyError if there is none of that name."""
        TROUBLES[name]
        with self._lock:
            self._due[name] += times * _TIMES.get(name, 1)

    def take(self, name: str) -> bool:
        """Whether that trouble is to happen now; it is then done with."""
        if not self._due[name]:
            return False
        with self._lock:
            due = self._due[name] > 0
            self._due[name] -= due
            return due


# --- the DAGs


class _Shop:
    """The tasks of the shop that trouble can come to."""

    def __init__(self, troubles: Troubles) -> None:
        self.troubles = troubles

    async def receive(self, order: Context) -> Context:
        if self.troubles.take("block"):
            time.sleep(1.0)  # noqa: ASYNC251 - the trouble that was asked for
        await asyncio.sleep(0.002)
        return order

    async def screen(self, order: Context) -> Context | None:
        return None if order["number"] % 40 == 13 else order

    def price(self, order: Context) -> Context:
        time.sleep(0.4 if order["number"] % 50 == 7 else 0.004)
        order["total"] = 3 * order["amount"]
        return order

    async def partner(self, order: Context) -> Context:
        await asyncio.sleep(0.003)
        if self.troubles.take("outage") or (order["number"] % 8 == 3 and order.attempt == 1):
            raise PartnerDown("no answer")
        return order

    async def number(self) -> AsyncGenerator[Context | None, Context]:
        done = None
        for receipt in count(1):
            order = yield done
            if self.troubles.take("restart"):
                raise RuntimeError("the counter is lost")
            order["receipt"] = receipt
            done = order

    async def pick(self, line: Context) -> Context:
        await asyncio.sleep(0.05 if line["line"] == 2 else 0.01)
        return line

    async def deliver(self, order: Context) -> Context | None:
        if order["number"] % 30 == 17:
            raise Undeliverable(f"order {order['number']} has no address")
        return None if self.troubles.take("vanish") else order


def orders(troubles: Troubles) -> DAG:
    """The DAG of the shop."""
    shop, dag = _Shop(troubles), DAG("orders")
    calls = RateLimit(30, burst=5, name="partner-api")
    packers = ConcurrencyLimit(2, name="packers")
    patient: dict[str, Any] = {"retry_times": 3, "retry_interval": Exponential(0.05), "retry_on": PartnerDown}

    dag.task(shop.receive)
    dag.task(shop.screen, after="receive", may_drop=True)
    dag.task(shop.price, after="screen")
    dag.task(risk, kind="process", after="screen")
    dag.task(shop.partner, after="screen", limiter=calls, **patient)
    dag.task(shop.number, kind="stream", after=["price", "risk", "partner"])
    dag.task(lines, kind="map", after="number")
    dag.task(shop.pick, after="lines", limiter=packers)
    dag.task(assemble, kind="join", after="pick")
    dag.task(shop.deliver, after="assemble")
    return dag


def risk(order: DetachedContext) -> DetachedContext:
    """Some work for a processor, in a worker process."""
    if order.get("break"):
        os._exit(3)
    order["risk"] = sum(each * each for each in range(20_000)) % 97
    return order


def lines(order: Context) -> Iterator[dict[str, int]]:
    """What the order consists of."""
    return ({"line": line} for line in range(1 + order["number"] % 3))


async def assemble(order: Context, picked: list[Context]) -> Context:
    """All lines are there."""
    order["lines"] = len(picked)
    return order


def settlement(troubles: Troubles) -> DAG:
    """The DAG of the back office."""
    dag = DAG("settlement")

    @dag.task(kind="loop")
    async def pages(day: Context) -> AsyncIterator[Context]:
        for page in range(4):
            await asyncio.sleep(0.01)
            made = day.create(name=f"{day.id}-page-{page}")
            made["page"] = page
            yield made

    @dag.task(after=pages)
    async def approve(page: Context) -> Context:
        if troubles.take("deadlock"):
            page.freeze()  # until somebody signs, and nobody will
        await asyncio.sleep(0.01)
        return page

    @dag.task(after=approve)
    async def book(page: Context) -> Context:
        return page

    return dag


def _journal(path: str) -> Any:
    if not path:
        return None
    from obsdag import SQLiteJournal

    return SQLiteJournal(path, keep=10_000)


class _Faulty(Observer):
    """An observer with a bug."""

    def execution_started(self, execution: Execution, now: float) -> None:
        raise RuntimeError("this observer has a bug")


# --- the service


class DemoService:
    """Both engines, until it is told to stop. `troubles.ask(name)` makes trouble, from any thread."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.troubles = Troubles()
        self._telemetry = {engine: _telemetry(engine) for engine in ("shop", "back-office")}
        shop = ExecutorConfig(
            context_worker_num=16,
            task_worker_num=0,
            thread_pool_worker_num=4,
            process_pool_worker_num=1,
            max_live_contexts=500,
            max_pending=100,
            result_ttl=5.0,
            drain_grace=5.0,
            telemetry=self._telemetry["shop"],
            journal=_journal(options.journal),
        )
        office = ExecutorConfig(
            context_worker_num=2,
            context_queue_timeout=0.1,
            worker_idle_times=5,
            shutdown_grace=1.0,
            telemetry=self._telemetry["back-office"],
        )
        self.shop = ServeExecutor(orders(self.troubles), config=shop)
        self.office = Executor(settlement(self.troubles), config=office)
        self._stop = asyncio.Event()
        self._number = 0

    def stop(self) -> None:
        """Takes in no more, and ends when all is done."""
        self._stop.set()

    async def run(self) -> None:
        """Serves until `stop`."""
        async with asyncio.TaskGroup() as group, self.shop:  # in this order: it drains while results are still fetched
            background = [
                group.create_task(self._settle()),
                *(group.create_task(self._ask(name, every)) for name, every in self.options.trouble.items()),
            ]
            await self._submit(group)
            for task in background:
                task.cancel()
        for telemetry in self._telemetry.values():
            await telemetry.close()

    async def _submit(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._stop.is_set():
            self._number += 1
            data = {"number": self._number, "amount": 10 + self._number % 7}
            if self.troubles.take("broken_pool"):
                data["break"] = 1
            if self.troubles.take("reject"):
                with suppress(ObsdagError):
                    await self.shop.submit(data, deadline=-1.0)
            with suppress(QueueFullError):  # more comes in than goes out: this one is lost
                ticket = await self.shop.submit(data, id=f"order-{self._number}", wait=1.0)
                if self._number % 100:  # whoever made the hundredth does not ask for its result
                    group.create_task(_fetch(ticket))
            due = max(due + 1 / self.options.rate, loop.time())
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._stop.wait()

    async def _settle(self) -> None:
        office = self.office
        for day in count():
            executor = office
            if self.troubles.take("drops"):
                executor = Executor(office.dag, config=office.config.replace(observers=(_Faulty(),)))
            await executor.run(Context(name=f"day-{day}"))
            await asyncio.sleep(self.options.settle_every_s)

    async def _ask(self, name: str, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            self.troubles.ask(name)


async def _fetch(ticket: Any) -> None:
    with suppress(ContextFailedError, NoOutputError, ServeError):
        await ticket.results()


def _telemetry(engine: str) -> Telemetry:
    from obsdag.telemetry import Telemetry, Tracing

    if not any(os.environ.get(f"OTEL_EXPORTER_OTLP_{each}ENDPOINT") for each in ("", "TRACES_")):
        return Telemetry(engine=engine)
    return Telemetry(engine=engine, tracing=Tracing.otlp(slow_after=0.4, sample=0.05))


# --- HTTP


@contextmanager
def controls(options: Options, troubles: Troubles) -> Iterator[int]:
    """Answers POST /trouble/NAME and POST /alerts in threads, meanwhile; gives the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(_answer(self.path, body, troubles))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing: what is asked for shows."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        daemon_threads = True

    with Server((options.host, options.control_port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="demo-controls", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _answer(path: str, body: bytes, troubles: Troubles) -> int:
    """The status of the answer."""
    where, _, name = path.strip("/").partition("/")
    if where == "alerts":
        try:
            alerts = json.loads(body)["alerts"]
            for alert in alerts:
                labels = dict(alert["labels"])
                _LOG.warning("alert %s is %s: %s", labels.pop("alertname", "?"), alert["status"], labels)
        except (ValueError, KeyError, TypeError):
            return 400
        return 204
    if where != "trouble" or name not in TROUBLES:
        return 404
    troubles.ask(name)
    return 204


def main(options: Options | None = None) -> int:
    """Serves until SIGINT or SIGTERM; the exit status. Raises ConfigError, and OSError if a port is taken."""
    from obsdag import logs

    options = options or Options()
    logs.configure(json=not os.isatty(2))
    asyncio.run(_serve(options))
    return 0


async def _serve(options: Options) -> None:
    from obsdag.ops import start_ops_server

    service = DemoService(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, service.stop)
    page = {name: getattr(options, name) for name in ("host", "port", "token", "jaeger_url")}
    with ExitStack() as stack:
        ops = stack.enter_context(start_ops_server(service.shop, service.office, **page))
        port = stack.enter_context(controls(options, service.troubles))
        print(
            f"page:    {ops.url}\n"
            f"metrics: {ops.url}/metrics\n"
            f"trouble: POST http://{ops.host}:{port}/trouble/NAME, of {', '.join(TROUBLES)}",
            flush=True,
        )
        await service.run()


if __name__ == "__main__":
    main()
