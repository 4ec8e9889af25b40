"""Routing with a sub-graph: each parcel takes the way that is chosen for it, and two ways share one DAG of their own.

    check (router) -> home/label -> home/load ------------------+-> notify
                   -> customs -> abroad/label -> abroad/load ---+
                   -> refuse (drops)

`python -m obsdag.examples.routing` draws the graph as Mermaid text, then prints the way of every parcel through it.
"""

from __future__ import annotations

from typing import Any

from obsdag import DAG, Context, Executor, ExecutorConfig, RunResult

__all__ = ["PARCELS", "dag", "main", "send", "shipping"]

shipping = DAG("shipping")


@shipping.task
async def label(parcel: Context) -> Context:
    """The first step of shipping, wherever it goes."""
    parcel["label"] = f"{parcel['to']}-{parcel['number']:03}"
    return parcel


@shipping.task(after=label)
async def load(parcel: Context) -> Context:
    """The last step of shipping."""
    parcel["loaded"] = True
    return parcel


dag = DAG("parcels")


@dag.router(targets=["home", "customs", "refuse"], kind="foreground_router")
def check(parcel: Context) -> str:
    """Returns the name of what comes next; a whole sub-graph has one, too."""
    if parcel["kg"] > 30:
        return "refuse"
    return "home" if parcel["to"] == "HOME" else "customs"


@dag.task(after=check)
async def customs(parcel: Context) -> Context:
    """For what goes abroad only."""
    parcel["declared"] = True
    return parcel


@dag.task(after=check, may_drop=True)
async def refuse(parcel: Context) -> Context | None:
    """Returns nothing: the parcel goes no further. `may_drop` says that this is meant."""
    return None if parcel["kg"] > 30 else parcel


home = dag.include(shipping, name="home", after=check)
abroad = dag.include(shipping, name="abroad", after=customs)


@dag.task(after=[home, abroad])
async def notify(parcel: Context) -> Context:
    """Ways that come together again: one step for all that are on their way."""
    parcel["way"] = [*parcel.completed_tasks, "notify"]
    return parcel


PARCELS: list[dict[str, Any]] = [
    {"number": 1, "to": "HOME", "kg": 2},
    {"number": 2, "to": "OSLO", "kg": 7},
    {"number": 3, "to": "HOME", "kg": 31},
    {"number": 4, "to": "LIMA", "kg": 30},
]


def send(parcels: list[dict[str, Any]]) -> RunResult:
    """Runs the parcels; each output has a `label` and its `way`."""
    return Executor(dag, config=ExecutorConfig(context_worker_num=4)).run_sync(parcels)


def main() -> None:
    """Prints the graph and the ways."""
    print(dag.to_mermaid())
    result = send(PARCELS)
    for parcel in sorted(result, key=lambda parcel: parcel["number"]):
        print(f"{parcel['label']}: {' > '.join(parcel['way'])}")
    print(f"{result.counts['dropped']} refused")


if __name__ == "__main__":
    main()
