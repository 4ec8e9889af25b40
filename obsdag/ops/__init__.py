"""What a running service shows: `/metrics`, `/healthz`, `/readyz`, `/api/state`, and a live page at `/`.

Two ways, one application:

    app.mount("/obsdag", create_app(executor, token=...))        # in a service that speaks ASGI
    with start_ops_server(executor, port=9464) as ops: ...       # its own thread and loop, extra `obsdag[ops]`

On its own thread it answers while a task blocks the engine's loop, and `/healthz` says so; mounted, it shares that loop
and its fate. Everything is read-only, and a run pays nothing for it until something goes wrong or somebody looks.

The way of a number: `Reader` (state.py) reads a living run from outside, `Watch` (watch.py) remembers its rare facts,
`Feed` (feed.py) turns both into JSON once for all who look, `OpsApp` (app.py) answers requests that `Guard` (guard.py)
let through, `OpsServer` (server.py) is the thread and http.py the connections of the standalone mode.
"""

from obsdag.ops.app import OpsApp, create_app
from obsdag.ops.server import OpsServer, start_ops_server

__all__ = ["OpsApp", "OpsServer", "create_app", "start_ops_server"]
