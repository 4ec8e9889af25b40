"""Examples that run: `python -m obsdag.examples.NAME`, each saying at its top what one sees.

files      fan-out and join: a folder becomes its files, and they become one answer
polling    a polling source, and a rate limit shared by the source and what follows it
batching   a batching writer as a service: one transaction for many contexts, an answer for each
routing    a router, and a DAG that is included twice in another
hosts      logging and tracing in hosts that set them up in their own ways
fastapi_service  a web service on FastAPI: back-pressure, deadlines, traces, draining, metrics of several processes
queue_worker  a plain asyncio worker that takes messages from a queue, and loses none
census     a census of the Python files below a folder, which `obsdag demo` shows at work
demo_service  a service under steady load, with trouble on demand, which `obsdag demo --serve` runs
"""

__all__: list[str] = []
