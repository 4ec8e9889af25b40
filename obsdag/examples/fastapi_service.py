"""A web service: each request is a context on its way through a DAG, and its answer is what comes out.

    check -> price ---\
          -> stock ----> quote

    uvicorn obsdag.examples.fastapi_service:app
    curl localhost:8000/quotes -H 'content-type: application/json' -d '{"items": ["tea", "milk"]}'

The live page is at http://localhost:8000/ops/, metrics at /ops/metrics. What to look at in here:

- the lifespan starts the executor and drains it: uvicorn answers what it has accepted, then the block ends
- the request's `traceparent` is handed to `execute`, so that the DAG's spans continue the caller's trace
- `X-Request-Timeout: 2.5` is the deadline of the context, and of all that is made from it
- more than the executor takes is answered 503 with Retry-After, at once: nothing piles up
- with several processes (`--workers 4`) each has a port of its own for metrics: set ORDERS_FILE_SD to a folder that
  Prometheus reads as `file_sd_configs`, and each writes its target there for as long as it runs

- with ORDERS_RAY=local (or a cluster's address) the DAG runs on a Ray cluster, on ORDERS_SHARDS engines; nothing else
  changes for those who ask for quotes

Settings come from OBSDAG_* variables, and ORDERS_OTLP (where to send spans), ORDERS_OPS_TOKEN, ORDERS_CALL_S (how long
the database takes here).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Header, HTTPException, Request
from pydantic import BaseModel, Field

import obsdag.logs
from obsdag import (
    DAG,
    Context,
    ContextFailedError,
    DeadlineExceeded,
    ExecutorConfig,
    NotAcceptingError,
    QueueFullError,
    ServeExecutor,
    Telemetry,
    Tracing,
)
from obsdag.ops import create_app, start_ops_server

if TYPE_CHECKING:
    from obsdag.ray import RayServeExecutor

__all__ = ["Order", "UnknownItem", "app", "build", "executor"]

CALL_S = float(os.environ.get("ORDERS_CALL_S", "0.002"))
PRICES = {"tea": 320, "milk": 110, "bread": 275, "honey": 640}


class UnknownItem(Exception):
    """What was ordered is not sold here: the caller's mistake."""


def build() -> DAG:
    """The DAG of one quote; price and stock are asked for at the same time."""
    dag = DAG("quotes")

    @dag.task
    async def check(ctx: Context) -> Context:
        unknown = [item for item in ctx["items"] if item not in PRICES]
        if unknown:
            raise UnknownItem(f"not sold here: {', '.join(unknown)}")
        return ctx

    @dag.task(after=check, retry_times=1, timeout=1.0)
    async def price(ctx: Context) -> Context:
        await asyncio.sleep(CALL_S)  # a database, say
        ctx["cents"] = sum(PRICES[item] for item in ctx["items"])
        return ctx

    @dag.task(after=check)
    async def stock(ctx: Context) -> Context:
        await asyncio.sleep(CALL_S)
        ctx["days"] = 1 + len(ctx["items"]) // 10
        return ctx

    @dag.task(after=[price, stock])
    async def quote(ctx: Context) -> Context:
        ctx["text"] = f"{ctx['cents'] / 100:.2f} in {ctx['days']} days"
        return ctx

    return dag


# --- what lives as long as the process


def make_telemetry(otlp: str | None, shard: str = "") -> Telemetry:
    """Of this process, or of a shard, whose environment is another one. otlp: where to send spans."""
    return Telemetry("quotes", tracing=Tracing.otlp(otlp) if otlp else Tracing())


def make_executor(config: ExecutorConfig) -> ServeExecutor | RayServeExecutor:
    """One that runs the DAG here, or on a Ray cluster, where each shard has telemetry of its own."""
    address, otlp = os.environ.get("ORDERS_RAY"), os.environ.get("ORDERS_OTLP")
    if address is None:
        return ServeExecutor(build(), config=config.replace(telemetry=make_telemetry(otlp)))
    from obsdag.ray import RayServeExecutor

    shards = int(os.environ.get("ORDERS_SHARDS", "2"))
    telemetry = partial(make_telemetry, otlp)
    return RayServeExecutor(build(), config, address=address, shards=shards, telemetry=telemetry, ops={})


executor = make_executor(
    ExecutorConfig.load({"context_worker_num": 64, "task_worker_num": 0, "max_live_contexts": 256, "max_pending": 256})
)
_token = os.environ.get("ORDERS_OPS_TOKEN")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Starts to serve, and drains: by then uvicorn has answered all that it had accepted."""
    obsdag.logs.configure(json=True)
    async with AsyncExitStack() as stack:
        folder = os.environ.get("ORDERS_FILE_SD")
        if folder:
            stack.enter_context(start_ops_server(executor, port=0, token=_token, file_sd=folder))
        await stack.enter_async_context(executor)
        yield
    if executor.config.telemetry is not None:
        await executor.config.telemetry.close()


app = FastAPI(title="quotes", lifespan=lifespan)
app.mount("/ops", create_app(executor, token=_token))


# --- requests


class Order(BaseModel):
    """What is asked for."""

    items: list[str] = Field(min_length=1, max_length=100)


@app.post("/quotes")
async def quotes(
    order: Order, request: Request, x_request_timeout: Annotated[float | None, Header(gt=0, le=60)] = None
) -> dict[str, Any]:
    """A quote for an order; 503 when too much is under way, 504 when the deadline has passed."""
    begun = time.monotonic()
    try:
        output = await executor.execute(
            {"items": order.items}, carrier=dict(request.headers), deadline=x_request_timeout, wait=False
        )
    except (QueueFullError, NotAcceptingError) as error:
        raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
    except ContextFailedError as error:
        if isinstance(error.__cause__, DeadlineExceeded):
            raise HTTPException(504, f"no quote within {x_request_timeout:g} s") from error
        if isinstance(error.__cause__, UnknownItem):
            raise HTTPException(422, str(error.__cause__)) from error
        raise
    return {"quote": output["text"], "cents": output["cents"], "took_ms": round(1e3 * (time.monotonic() - begun), 1)}
