"""Shards on Ray: a Ray Data set of shards, mapped by a pool of actors with one Scorer each.

A shard's texts never pass through Ray: an actor reads them from the input and writes its part, so
input, engine and output have the same paths on every node. Ray's part is to place the actors, to
hand out shards, and to start an actor again that died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from convbert_deploy.bulk_scoring.folder import BulkFolder
from convbert_deploy.bulk_scoring.plan import Shard
from convbert_deploy.bulk_scoring.processes import ATTEMPTS, remote_error
from convbert_deploy.bulk_scoring.shard_scoring import Job, ShardResult, ShardScorer
from convbert_deploy.errors import ConvBertDeployError, EngineError, InputError

#: Ray keeps each block of a data set as an object: with more shards a block holds several
_MOST_BLOCKS = 1000
#: bytes; only descriptions of shards are stored
_OBJECT_STORE = 100 * 2**20
#: CPUs that Ray Data's other tasks need: without one free they wait for ever
_FREE_CPUS = 1
_CONNECT_SECONDS = 10


class ShardActor:
    """What ``map_batches`` constructs once in each actor."""

    def __init__(self, job: Job) -> None:
        self._scorer = ShardScorer(job)
        self._folder = BulkFolder(pathlib.Path(job.output), job.output_format)
        self._error: ConvBertDeployError | None = None
        try:
            self._scorer.__enter__()
        except ConvBertDeployError as error:
            self._error = error  # Ray would take it for a reason to start the actor again

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """batch: ``shard``, each as JSON. Gives ``report``: a result or a user's error, as JSON."""
        return {"report": [self._report(Shard.from_json(json.loads(s))) for s in batch["shard"]]}

    def _report(self, shard: Shard) -> str:
        try:
            if self._error is not None:
                raise self._error
            self._count_attempt(shard)
            return json.dumps(self._scorer.score(shard).to_json())
        except ConvBertDeployError as error:
            return json.dumps({"failed": [type(error).__name__, str(error), error.hint]})

    def _count_attempt(self, shard: Shard) -> None:
        if self._folder.begin_attempt(shard.index) > ATTEMPTS:
            raise EngineError(
                f"shard {shard.index} ({shard.file}, row {shard.first} on) ended its actor "
                f"{ATTEMPTS} times",
                hint="fewer --workers where memory is short; the same command goes on from here",
            )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected: to ``address``, to what ``RAY_ADDRESS`` names, or started on this machine,
    with the loopback address as the node's. A connection that was there is left as it is.

    Raises:
        InputError: no cluster at the address.
    """
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own = {}
    if address != "local":
        check_reachable(address)
    else:
        own = {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster at {address}: {error}",
            hint="RAY_AUTH_MODE must be the cluster's; --local does without Ray",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raises InputError where nothing listens there; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or a form that Ray knows better
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster at {address}: {error.strerror or error}",
            hint="ray start --head starts one; --local does without Ray",
        ) from error


def check_room(
    workers: int | None, threads: int, gpus: int, nodes: Sequence[Mapping[str, float]]
) -> int:
    """The number of actors: ``workers``, or as many as find room.

    nodes: each node's resources, ``CPU`` and ``GPU``. Actors that hold every CPU of the cluster, or
    that fit no node, would wait for ever.

    Raises:
        InputError: more than the cluster can run beside Ray Data's own tasks.
    """
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    room = sum(_room(node, threads, gpus) for node in nodes)
    most = min(room, max(0, cpus - _FREE_CPUS) // threads)
    wanted = workers or max(most, 1)
    if wanted > most:
        each = f"{threads} CPUs" + (f" and {gpus} GPUs" if gpus else "")
        raise InputError(
            f"{wanted} workers of {each} each, beside the {_FREE_CPUS} CPU that Ray Data needs, do "
            f"not fit a cluster of {len(nodes)} nodes with {cpus} CPUs together: the job would "
            "wait for ever",
            hint=f"--workers {most}"
            if most
            else "fewer --threads-per-worker, a cluster with more CPUs, or --local",
        )
    return wanted


def _room(node: Mapping[str, float], threads: int, gpus: int) -> int:
    """Actors that fit one node."""
    room = int(node.get("CPU", 0)) // threads
    return min(room, int(node.get("GPU", 0)) // gpus) if gpus else room


def live_nodes(ray: Any) -> list[Mapping[str, float]]:
    """Resources of each node of the cluster that is up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def score_on_ray(
    ray: Any, job: Job, shards: Sequence[Shard], workers: int, gpus: int
) -> Iterator[ShardResult]:
    """Yield each shard's result as it is finished, in any order.

    gpus: of each actor. Ray starts an actor again that died, without end; that a shard does not
    kill actors for ever is counted in the folder.

    Raises:
        EngineError: actors died too often. ConvBertDeployError: a worker's own error.
    """
    from ray.util.client import ray as client

    settings = (job, shards, workers, gpus)
    found = _asked_for(ray, *settings) if client.is_connected() else reports(*settings)
    for report in found:
        yield _result(json.loads(report))


def reports(job: Job, shards: Sequence[Shard], workers: int, gpus: int) -> Iterator[str]:
    """What actors report of shards, where Ray Data itself can run: on a node of the cluster."""
    import ray.data

    _quieten(ray.data.DataContext.get_current())
    rows = [{"shard": json.dumps(shard.to_json())} for shard in shards]
    results = ray.data.from_items(
        rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)
    ).map_batches(
        ShardActor,
        batch_size=1,
        batch_format="numpy",
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=job.threads,
        num_gpus=gpus or None,
    )
    try:
        for batch in results.iter_batches(batch_size=None, batch_format="numpy"):
            yield from (str(report) for report in batch["report"])
    except ray.exceptions.RayError as error:
        hint = "fewer --workers where memory is short; the same command goes on from here"
        yield json.dumps({"failed": ["EngineError", f"Ray could not go on: {error}", hint]})


def _quieten(context: Any) -> None:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if hasattr(context, "max_consecutive_actor_init_deaths"):
        context.max_consecutive_actor_init_deaths = ATTEMPTS - 1


class Driver:
    """Runs Ray Data on the cluster for a client outside (``ray://``), in which it cannot run."""

    def __init__(self, job: Job, shards: Sequence[Shard], workers: int, gpus: int) -> None:
        self._reports = reports(job, shards, workers, gpus)

    def next_report(self) -> str | None:
        """None behind the last."""
        return next(self._reports, None)


def _asked_for(
    ray: Any, job: Job, shards: Sequence[Shard], workers: int, gpus: int
) -> Iterator[str]:
    driver = ray.remote(num_cpus=0)(Driver).remote(job, list(shards), workers, gpus)
    try:
        while (report := ray.get(driver.next_report.remote())) is not None:
            yield report
    finally:
        ray.kill(driver)


def _result(report: dict[str, Any]) -> ShardResult:
    if "failed" in report:
        raise remote_error(*report["failed"])
    return ShardResult(**report)
