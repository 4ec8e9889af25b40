"""DAGs that shards import."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

from opentelemetry.baggage import get_baggage

from obsdag import DAG, Context
from tests.shards.heavy import double, raise_two

mixed = DAG("mixed")
"""Outputs, failures, drops, children, a map with its join: every outcome but cancelled."""


@mixed.task
async def grow(context: Context) -> Context:
    context["x"] = context["x"] + 1
    return context


@mixed.task(after=grow, may_drop=True)
def sort_out(context: Context) -> Any:
    x = context["x"]
    if x % 10 == 0:
        raise ValueError(f"bad {x}")
    if x % 7 == 0:
        children = context.create_child(2)
        for child in children:
            child["x"] = x
        return children
    return None if x % 11 == 0 else context


@mixed.map(after=sort_out)
def parts(context: Context) -> Iterator[Any]:
    for number in range(3):
        child = context.create_child()
        child["part"] = number
        yield child


@mixed.task(after=parts, retry_times=2)
async def flaky(context: Context) -> Context:
    if context.attempt == 1 and context["part"] == 1:
        raise OSError("once")
    return context


@mixed.join(after=flaky)
def total(context: Context, children: list[Context]) -> Context:
    context["total"] = sum(child["part"] for child in children)
    return context


slow = DAG("slow")
"""A map of parts that take their time and are retried, and their join; and the process in which it ran."""


@slow.map
def split(context: Context) -> Iterator[Any]:
    for number in range(3):
        child = context.create_child()
        child["part"] = number
        yield child


@slow.task(after=split, retry_times=3, retry_interval=0.02)
async def work(context: Context) -> Context:
    await asyncio.sleep(0.005)
    if context.attempt == 1:
        raise OSError("the first attempt always fails")
    return context


@slow.join(after=work)
def gather(context: Context, children: list[Context]) -> Context:
    context["parts"] = sorted(child["part"] for child in children)
    context["pid"] = os.getpid()
    return context


deadly = DAG("deadly")


@deadly.task
async def die(context: Context) -> Context:
    if context["x"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.sleep(0.001)
    return context


odd = DAG("odd")


@odd.task
def strange(context: Context) -> Context:
    if context["x"] == 3:
        context["thing"] = object()
    return context


stuck = DAG("stuck")


@stuck.task
async def wait(context: Context) -> Context:
    await asyncio.sleep(3600)
    return context


baggage = DAG("baggage")


@baggage.task
async def look(context: Context) -> Context:
    context["customer"] = get_baggage("customer")
    return context


logging_ = DAG("logging")


@logging_.task
async def say(context: Context) -> Context:
    logging.getLogger("tests").warning("of the task's own")
    raise ValueError("and then it fails")


mixed_and_stuck = DAG("mixed and stuck")


@mixed_and_stuck.task
async def check(context: Context) -> Context:
    if context.get("stuck"):
        await asyncio.sleep(3600)
    if context["x"] == 9:
        raise ValueError("bad")
    return context


far = DAG("far")
far.task(double, runner="ray", resources={"num_cpus": 1})


@far.task(after="double")
async def here(context: Context) -> Context:
    context["shard_pid"] = os.getpid()
    return context


quoted = DAG('the "quoted" dag')


@quoted.task(name='it\'s a "task"')
def raise_for_two(context: Context) -> Context:
    return context if context["x"] == 1 else raise_two(context)


gate = DAG("gate")


@gate.task
async def wait_for_it(context: Context) -> Context:
    while not os.path.exists(context["gate"]):  # noqa: ASYNC240 - a look at a local file
        await asyncio.sleep(0.01)
    return context


stepped = DAG("stepped")


@stepped.task
async def first(context: Context) -> Context:
    return context


@stepped.task(after=first)
async def second(context: Context) -> Context:
    await asyncio.sleep(3600)
    return context


unwritable = DAG("unwritable")
"""Texts that UTF-8 has no form of: of an error, and of a child's id."""


@unwritable.task
async def look_for_it(context: Context) -> Any:
    if context["x"] == 1:
        raise FileNotFoundError("no file b\udcff")
    if context["x"] == 2:
        return context.create_child(name="c\udcff")
    return context


class Homebody:
    """Can be unpickled in the process that pickled it, and nowhere else."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _at_home, (os.getpid(),)


def _at_home(pid: int) -> Homebody:
    if pid != os.getpid():
        raise LookupError("not at home")
    return Homebody()


homebodies = DAG("homebodies")


@homebodies.task
async def settle(context: Context) -> Context:
    if context["x"] == 1:
        context["guest"] = Homebody()
    return context
