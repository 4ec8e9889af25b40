"""The pure core: everything that decides, as plain synchronous code over plain data.

No asyncio, no threads, no clock, no I/O, no telemetry in here. Time is handed in, user functions are run by the shell
(`obsdag.executor`, `obsdag.worker`), and what happened is told to observers after the transition.
Layers, from the ground up:

    states      the states a context can be in, lanes, outcomes
    records     what there is one of per execution, per lent branch, per stall
    observer    the Observer protocol and the fan-out to several of them
    queue       three lanes and the timer heap
    base        fields of a run, bookkeeping of states, the conservation law
    lifecycle   holds, ends, cascades
    waits       limits, retries, timers, freezes
    lending     branches lent to children, and handed back
    progress    executions, completed tasks, dead edges
    joins       joins, and what nothing holds any more
    sources     loops and maps that are pulled
    state       RunState: accept, take, start, finish, fail, wake, ... and the diagnosis of a stall
"""

__all__: list[str] = []
