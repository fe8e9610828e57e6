"""A Ray cluster: joined for a stage, its workers started, and what goes wrong there said in one line.

This is the one module that knows Ray, which is imported when a config asks for it. Ray restarts nothing here: who uses
a worker knows what it was working on, starts another one (`Cluster.start`) and asks it again, wherever there is room.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from jaxdistill.config import RayConfig

CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster of our own; what is in it at a time are the answers that have just come."""
# no news of our use to Ray's makers; and a worker without a GPU is left what it sees, which will be Ray's own default
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Gone(Exception):
    """A worker died, or cannot be reached; its text says why."""


@contextlib.contextmanager
def joined(config: RayConfig, section: str) -> Iterator[Cluster]:
    """Joins the cluster of a config section, or starts one on this machine, and leaves or ends it afterwards.

    A program that has joined a cluster already stays in that one.

    Raises:
      ValueError: Ray is not installed, or the cluster cannot be reached; with the section's name.
    """
    ray = _import_ray(section)
    if ray.is_initialized():
        yield Cluster(ray, config, section, Interrupt(), own=False)
        return
    own = config.address is None
    if config.address not in (None, "auto"):
        _knock(config.address, section)
    with _signals_kept():
        _init(ray, config.address, section)
        interrupt = Interrupt()
        try:
            with interrupt.heard():
                yield Cluster(ray, config, section, interrupt, own=own)
        finally:
            with _quiet():
                ray.shutdown()


class Interrupt:
    """Ctrl-C, remembered: where Python drops references of Ray's, its KeyboardInterrupt is said and forgotten."""

    def __init__(self):
        self._seen = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Takes SIGINT, if signals come to this thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._take)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _take(self, *_: object) -> None:
        self._seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        if self._seen:
            raise KeyboardInterrupt


class Cluster:
    """A cluster that has been joined."""

    def __init__(self, ray: Any, config: RayConfig, section: str, interrupt: Interrupt, *, own: bool):
        self._ray, self._interrupt, self._own = ray, interrupt, own
        self.config, self.section = config, section

    def count(self) -> int:
        """How many workers to start.

        Raises:
          ValueError: more are asked for than a cluster on this machine can ever have room for.
        """
        room, wanted = self.room(), self.config.workers
        if self._own and room < (wanted or 1):
            raise ValueError(self.too_small(wanted or 1))
        return wanted or max(1, room)

    def room(self) -> int:
        """How many workers fit on the nodes that are there, whatever else runs on them."""
        needs = self.config.needs
        return sum(
            min(int(node["Resources"].get(name, 0) / amount + 1e-6) for name, amount in needs.items())
            for node in self._ray.nodes()
            if node["Alive"]
        )

    def too_small(self, wanted: int) -> str:
        """The line on a cluster in which so many workers have no place."""
        total = self._ray.cluster_resources()
        needs = ", ".join(f"{amount:g} {name}" for name, amount in self.config.needs.items())
        there = ", ".join(f"{total.get(name, 0):g} {name}" for name in self.config.needs)
        return (
            f"{self.section} asks for {wanted} workers of {needs} each, but the cluster has {there}, room for "
            f"{self.room()}; lower workers, num_cpus, num_gpus or resources, or start more nodes."
        )

    def start(self, kind: type, *arguments: Any) -> Worker:
        """A new worker; `kind` is a class of a module that the cluster's nodes have too. Does not wait for a place."""
        config = self.config
        remote = self._ray.remote(
            num_cpus=config.num_cpus, num_gpus=config.num_gpus, resources=config.resources, scheduling_strategy="SPREAD"
        )(kind)
        return Worker(self._ray, remote.remote(*arguments))

    def wait(self, calls: list[Any], seconds: float) -> list[Any]:
        """The calls among these that have ended, one of them at least unless the time is up first.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed, now or before.
        """
        self._interrupt.check()
        return self._ray.wait(calls, num_returns=1, timeout=seconds)[0]

    def result(self, call: Any) -> Any:
        """What a call came to.

        Raises:
          Gone: its worker died.
          ValueError: it raised one.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            raise Gone(_reason(str(error))) from None


class Worker:
    """An object on the cluster."""

    def __init__(self, ray: Any, handle: Any):
        self._ray, self._handle = ray, handle

    def call(self, method: str, *arguments: Any) -> Any:
        """Begins a call of a method, see `Cluster.result`; one comes after the other."""
        return getattr(self._handle, method).remote(*arguments)

    def stop(self) -> None:
        """Kills it, whether it runs or has no place yet."""
        self._ray.kill(self._handle)


# ----------------------------------------------------------------------------------------------------- joining


def _import_ray(section: str) -> Any:
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    with _quiet():
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError(
                f"{section.removesuffix('.ray')}.executor: ray needs Ray; pip install 'jaxdistill[ray]', here and on "
                "every node."
            ) from None
    return ray


def _knock(address: str, section: str) -> None:
    """Ray itself takes minutes to see that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(section, address, str(error.strerror or error).lower()) from None


def _unreachable(section: str, address: str, reason: str) -> ValueError:
    return ValueError(
        f"{section}.address is {address}: {reason.rstrip('.')}; start the cluster (ray start --head), or leave "
        "address out for one on this machine."
    )


def _init(ray: Any, address: str | None, section: str) -> None:
    options: dict[str, Any] = {"address": address}
    if address is None:
        options = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with _quiet():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:300]
        if address is None:
            raise ValueError(f"{section}: no Ray cluster can be started here: {reason}") from None
        raise _unreachable(section, address, reason) from None
    # what Ray reports of workers that died would come between the lines of our progress; there is no public switch
    ray._private.worker._worker_logs_enabled = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's own warnings of what it will change one day, and of files that it leaves open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of SIGTERM's, and leaves it there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(text: str) -> str:
    """One line of Ray's many: of an error in a worker's own code the last one, otherwise what Ray found out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "creation task" in text:
        return lines[-1][:300]
    known = ("class_name:", "actor_id:", "pid:", "name:", "namespace:", "ip:")
    told = [line for line in lines if not line.startswith(known)]
    return " ".join(told)[:300] or "it died"
