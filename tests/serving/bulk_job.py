"""Runs the command ``bulk`` as a process of its own; with ``--ray CPUS`` first, inside a Ray that
this process starts on the loopback address; with ``--ray-client CPUS``, from outside of one."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from convbert_deploy.bulk_scoring.command import bulk
from convbert_deploy.command_line import Cli

_OBJECT_STORE = 100 * 2**20
_LIMIT_S = 60


def start_ray(cpus: str) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=int(cpus),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=_OBJECT_STORE,
        log_to_driver=False,
    )


@contextlib.contextmanager
def ray_head(cpus: str) -> Iterator[str]:
    """The ``ray://`` address of a cluster of one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
    words += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--num-cpus={cpus}"]
    words += [f"--object-store-memory={_OBJECT_STORE}", f"--ray-client-server-port={port}"]
    head = subprocess.Popen(words, stdout=sys.stderr)
    try:
        until = time.monotonic() + _LIMIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if head.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.1)
        yield f"ray://127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait()


def main() -> None:
    # A shell that starts the tests in the background lets them, and so this process, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        if sys.argv[1] == "--ray":
            start_ray(sys.argv[2])
            del sys.argv[1:3]
        elif sys.argv[1] == "--ray-client":
            address = stack.enter_context(ray_head(sys.argv[2]))
            sys.argv[1:3] = []
            sys.argv += ["--address", address]
        Cli("main", commands={"bulk": bulk})()


if __name__ == "__main__":
    main()
