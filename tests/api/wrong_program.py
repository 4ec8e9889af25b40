"""A user's program with mistakes that a type checker is to find: one in each line that says so."""

from __future__ import annotations

from obsdag import DAG, Context, Executor, ExecutorConfig, RateLimit, ServeExecutor

dag = DAG("orders")


@dag.task
async def step(ctx: Context) -> Context:
    return ctx


def plain(ctx: Context) -> Context:
    return ctx


async def main() -> None:
    dag.add_task(plain)  # wrong
    dag.task(plain, after=7)  # wrong
    Executor("orders")  # wrong
    Executor(dag, config={"context_worker_num": 2})  # wrong
    ExecutorConfig(workers=3)  # wrong
    ExecutorConfig(on_failure="ignore")  # wrong
    RateLimit("often")  # wrong
    result = await Executor(dag).run(7)  # wrong
    print(result.failure)  # wrong
    result.counts["output"].upper()  # wrong
    print(step.config.retries)  # wrong
    async with ServeExecutor(dag) as serving:
        serving.submit({}).result()  # wrong
    Context(data=5)  # wrong
