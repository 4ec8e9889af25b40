"""Everything that is Ray's: the connection, what it is allowed to be, and the actors that shards live in.

Who can reach a port of a Ray cluster can run code on it, as whoever runs the cluster. So a cluster that obsdag starts
listens on the loopback interface only, without dashboard, and tells nobody about its use; and one that others can reach
is refused unless it asks for a token, or the caller says `insecure=True`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from obsdag.errors import ConfigError, PlanChangedError, unless_missing
from obsdag.graph import DAG
from obsdag.ops.server import OpsServer, start_ops_server
from obsdag.ray.shard import ShardEngine
from obsdag.ray.wire import codec_of
from obsdag.telemetry import Telemetry
from obsdag.telemetry.lines import PROCESS

try:
    import ray
    from ray import cloudpickle
    from ray._private import ray_constants
except ImportError as error:  # pragma: no cover - the tests of this have it
    raise ImportError("RayExecutor needs Ray: pip install 'obsdag[ray]'") from unless_missing(error, "ray")

if TYPE_CHECKING:
    from obsdag.config import ExecutorConfig

__all__ = ["Cluster", "Settings", "ShardDied", "ShardRaised", "carry_dag", "fetch_dag", "is_off"]

ShardDied: Any = ray.exceptions.RayActorError
"""What an awaited call raises when the shard's process or node is gone, or out of reach."""
ShardRaised: Any = ray.exceptions.RayTaskError
"""What an awaited call raises for an exception that was raised there, its `cause`."""

_TOKEN = "`ray get-auth-token --generate` once, the token on all machines, RAY_AUTH_MODE=token for `ray start` and here"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class Cluster:
    """A connection to a Ray cluster, for as long as somebody uses it.

    address: None takes the connection that there is, else starts a cluster on this machine; "local" always starts one;
    "auto" finds the one that this machine is part of; "host:port" names one. insecure: an address that others can
    reach is taken even if it does not ask for a token. cpus: of a cluster that is started, at least.
    """

    def __init__(self, address: str | None, insecure: bool, cpus: float) -> None:
        if address is not None and address.startswith("ray://"):
            raise ConfigError(f"{address!r} is a Ray client's address: run the driver on a machine of the cluster")
        self.address = address
        self.insecure = insecure
        self._cpus = cpus
        self._users = 0
        self._own = False
        if address not in (None, "local", "auto"):
            self._check(str(address))

    def acquire(self) -> None:
        """Connects, for the first user. It blocks: starting a cluster takes some 4 s. Raises ConfigError."""
        if not self._users and not self._is_connected():
            self._connect()
        try:
            if not self._users and not (self._own and self.address in (None, "local")):
                self._check(ray.get_runtime_context().gcs_address)
        except ConfigError:
            self._disconnect()
            raise
        self._users += 1

    def _is_connected(self) -> bool:
        """Whether this process is connected to the cluster that is meant. Raises ConfigError if it is to another."""
        if not ray.is_initialized():
            return False
        connected = ray.get_runtime_context().gcs_address
        if self.address in (None, "auto", connected):
            return True
        raise ConfigError(
            f"this process is connected to the Ray cluster at {connected} already, so it cannot use {self.address!r}: "
            "leave the address out to use that one, or call ray.shutdown() before"
        )

    def release(self) -> None:
        """Disconnects, for the last user, what `acquire` connected."""
        self._users -= 1
        if not self._users:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._own:
            ray.shutdown()
            self._own = False

    def _connect(self) -> None:
        with _own_signals():
            if self.address not in (None, "local"):
                self._join()
            else:
                cpus = max(os.cpu_count() or 1, math.ceil(self._cpus))
                with _for_itself():
                    ray.init(address="local", num_cpus=cpus, include_dashboard=False, configure_logging=False)
        self._own = True

    def _join(self) -> None:
        try:
            ray.init(address=self.address, configure_logging=False)
        except (ConnectionError, ValueError, ray.exceptions.RayError) as error:  # it is no address, nobody answers
            why = str(error).partition(". ")[0]  # there, or nobody without the token, or there is no token here
            raise ConfigError(
                f'address={self.address!r}: {why}; `ray start` begins one and tells its address, "local" needs none; '
                f"one that asks for a token takes nobody without: {_TOKEN}"
            ) from error

    def _check(self, address: str) -> None:
        if not (self.insecure or _is_loopback(address) or _asks_for_token()):
            raise ConfigError(
                f"the Ray cluster at {address} can be used by everybody who can reach it: switch on token "
                f"authentication ({_TOKEN}), or say insecure=True"
            )

    def start(self, name: str, dag: Any, config: bytes, options: Mapping[str, Any]) -> Any:
        """An actor for the shard of that name, which is on its way: its calls wait for it."""
        return ray.remote(_ShardActor).options(**{"scheduling_strategy": "SPREAD", **options}).remote(name, dag, config)

    def kill(self, actor: Any) -> None:
        """Ends an actor, in whatever state it is."""
        with contextlib.suppress(Exception):  # it is gone, or was never there
            ray.kill(actor)

    def places(self, options: Mapping[str, Any]) -> int:
        """How many shards started with these options the cluster's machines have room for, if nobody else uses them."""
        needs = {"CPU": options.get("num_cpus") or 1, "GPU": options.get("num_gpus"), **options.get("resources", {})}
        wanted = {name: amount for name, amount in needs.items() if amount}
        living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(min(int(has.get(name, 0) / amount) for name, amount in wanted.items()) for has in living)

    def shortage(self) -> str:
        """What the cluster has, in words, for a shard that finds no place on it."""
        return (
            f"the cluster has {_amounts(ray.cluster_resources())}, of which free: {_amounts(ray.available_resources())}"
        )


class _ShardActor:
    """A shard's engine in a process of its own; made an actor by `Cluster.start`."""

    def __init__(self, name: str, dag: Any, config: bytes) -> None:
        self._name = name
        self._carried = dag, config
        self._engine: ShardEngine | None = None
        self._telemetry: Telemetry | None = None
        self._ops: OpsServer | None = None

    def __repr__(self) -> str:
        return self._name  # Ray puts it before each line that the shard prints or logs

    async def open(self) -> str:
        """Gets ready for runs, if it is not; the address of its `/metrics`, empty if it serves none."""
        if self._engine is None:
            self._engine = await self._opened()
        return "" if self._ops is None else _address_of(self._ops)

    async def _opened(self) -> ShardEngine:
        PROCESS["shard"] = self._name
        from obsdag.ray.jobs import RayCluster  # which is made of this module's `Cluster`

        settings = Settings.unpack(self._carried[1])
        config = settings.config.replace(ray=RayCluster(insecure=True))  # for tasks of runner="ray": where it is itself
        if settings.telemetry is not None:
            self._telemetry = settings.telemetry(self._name)
            config = config.replace(telemetry=self._telemetry)
        engine = ShardEngine(fetch_dag(self._carried[0]), config, codec_of(settings.allow_pickle))
        await engine.__aenter__()
        if settings.ops is not None:
            self._ops = start_ops_server(engine, **{"port": 0, **settings.ops})
        return engine

    async def begin(self, headers: Mapping[str, str]) -> int:
        """`ShardEngine.begin`."""
        assert self._engine is not None
        return await self._engine.begin(headers)

    async def feed(self, batch: bytes) -> None:
        """`ShardEngine.feed`."""
        assert self._engine is not None
        self._engine.feed(batch)

    async def cancel(self, number: int) -> None:
        """`ShardEngine.cancel`."""
        assert self._engine is not None
        self._engine.cancel(number)

    async def answers(self) -> bytes:
        """`ShardEngine.answers`."""
        assert self._engine is not None
        return await self._engine.answers()

    async def end(self, early: bool) -> dict[str, Any]:
        """`ShardEngine.end`."""
        assert self._engine is not None
        return await self._engine.end(early)

    async def close(self) -> None:
        """Lets go of its threads and processes, and exports what is kept of its traces."""
        if self._ops is not None:
            self._ops.close()
        if self._engine is not None:
            await self._engine.__aexit__(None, None, None)
        if self._telemetry is not None:
            await self._telemetry.close()


class Settings(NamedTuple):
    """What a shard is started with. telemetry: makes its telemetry, from its name. ops: of its `start_ops_server`, None
    for no server.
    """

    config: ExecutorConfig
    allow_pickle: bool
    telemetry: Callable[[str], Telemetry] | None
    ops: Mapping[str, Any] | None

    def pack(self) -> bytes:
        """As bytes, without what belongs to the driver. Raises ConfigError for a function that cannot be carried."""
        config = self.config.replace(telemetry=None, observers=(), journal=None, deadline=None, on_failure="continue")
        telemetry = _silence if self.telemetry is None and is_off(self.config) else self.telemetry
        try:
            packed: bytes = cloudpickle.dumps(tuple(self._replace(config=config, telemetry=telemetry)))
        except Exception as error:
            raise ConfigError(f"telemetry={self.telemetry!r} cannot be carried to a shard: {error}") from error
        return packed

    @classmethod
    def unpack(cls, packed: bytes) -> Settings:
        """On the shard: what `pack` packed."""
        return cls(*cloudpickle.loads(packed))


def _silence(shard: str) -> Telemetry:
    return Telemetry.off()


def is_off(config: ExecutorConfig) -> bool:
    """Whether its telemetry is `Telemetry.off()`."""
    return isinstance(config.telemetry, Telemetry) and config.telemetry._off


def _address_of(server: OpsServer) -> str:
    """Where Prometheus finds it: of all interfaces, the one that the cluster knows this machine by."""
    host = server.host if server.host not in ("0.0.0.0", "[::]") else ray.util.get_node_ip_address()
    return f"{host}:{server.port}"


# --- the DAG


def carry_dag(dag: DAG) -> tuple[str, Any]:
    """How a shard finds the DAG: by the name that it has in a module, else as a copy of it and its functions.

    Raises ConfigError if it has no such name and cannot be copied.
    """
    fingerprint = dag.build().fingerprint
    program = sys.modules.get("__main__")  # which multiprocessing enters as `__mp_main__` too
    for name, module in list(sys.modules.items()):
        if module is not program and getattr(module, "__spec__", None) is not None:
            for attribute, value in list(vars(module).items()):
                if value is dag:
                    return fingerprint, (name, attribute)
    state = {name: value for name, value in vars(dag).items() if name not in ("_plan", "_building", "_by_function")}
    try:
        return fingerprint, cloudpickle.dumps(state)
    except Exception as error:
        raise ConfigError(
            f"the DAG {dag.name!r} cannot be carried to a shard ({error}): give it a name at the top of a module that "
            "the cluster's machines can import"
        ) from error


def fetch_dag(carried: tuple[str, Any]) -> DAG:
    """The DAG of `carry_dag`, built. Raises PlanChangedError if another DAG goes by that name here."""
    fingerprint, found = carried
    if isinstance(found, bytes):
        dag = DAG()
        vars(dag).update(cloudpickle.loads(found))
        for task in (*dag.tasks.values(), dag.in_task, dag.out_task):  # they were built, and are built again
            task.upstream_tasks.clear()
            task.downstream_tasks.clear()
    else:
        dag = getattr(import_module(found[0]), found[1])
    if dag.build().fingerprint != fingerprint:
        raise PlanChangedError(f"the DAG {dag.name!r} is another one on this machine: install the same version of it")
    return dag


# --- small print


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]") or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _asks_for_token() -> bool:
    raylet = import_module("ray._raylet")
    return bool(raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN)


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {name: f"{number:g}" for name, number in resources.items() if name in ("CPU", "GPU")}
    return ", ".join(f"{number} {name}" for name, number in shown.items()) or "nothing"


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own handler of SIGTERM into place; the program's comes back."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _for_itself() -> Iterator[None]:
    """A cluster that is started in here listens on the loopback interface only, and reports its use to nobody."""
    given = {_LOOPBACK: "0", "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in given}
    reachable = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(given)
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray read it from the variable when it was imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = reachable
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
