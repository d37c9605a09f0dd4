"""Ray workers as forks of one process that has imported everything: a worker then starts in moments instead of seconds.

Ray runs this file in place of its `setup_worker.py`, see `started_by_forks`. The first worker of a raylet starts the
process that forks, and it ends with the raylet. What a worker does after its start is Ray's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import NoReturn

_TIMEOUT_S = 60.0
_RAYLET = "RAY_RAYLET_PID"  # Ray's library reads it once, when it is imported.


@contextmanager
def started_by_forks() -> Iterator[None]:
    """The Ray that is started meanwhile forks its workers: on Linux, and without a GPU, which survives no fork."""
    import ray._private.parameter as parameter
    import torch

    whole = parameter.RayParams

    def params(*args: object, **settings: object) -> object:
        return whole(*args, **{"setup_worker_path": __file__, **settings})

    if sys.platform == "linux" and not torch.cuda.is_available():
        parameter.RayParams = params
    try:
        yield
    finally:
        parameter.RayParams = whole


# --- What Ray runs in place of a worker -------------------------------------------------------------------------------


def _address() -> str:
    return f"\0rllib_calql_forks_{os.environ[_RAYLET]}"  # In no folder: nothing is left of it.


def _ask_for_a_worker() -> None:
    """Stays as long as the worker."""
    connection = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + _TIMEOUT_S
    is_started = False
    while True:
        try:
            connection.connect(_address())
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            if not is_started:
                subprocess.Popen([sys.executable, __file__, "serve"], start_new_session=True)
                is_started = True
            time.sleep(0.05)
    request = json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()})
    socket.send_fds(connection, [len(request.encode()).to_bytes(8, "big")], [1, 2])
    connection.sendall(request.encode())
    with suppress(ConnectionResetError):
        connection.recv(1)  # Until the worker has ended.


# --- The process that forks -------------------------------------------------------------------------------------------


def _serve() -> None:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_address())
    except OSError:  # Another worker was faster.
        return
    import ray._private.workers.default_worker
    import ray.rllib.core.learner.learner_group
    import ray.rllib.env.single_agent_env_runner
    import ray.tune.trainable  # noqa: F401

    import rllib_calql.algorithm  # noqa: F401

    listener.listen(64)
    listener.settimeout(1.0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # No zombies.
    while os.path.exists(f"/proc/{os.environ[_RAYLET]}"):
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _become_a_worker(connection)
            connection.close()


def _become_a_worker(connection: socket.socket) -> NoReturn:
    os.setsid()  # Ray kills the process groups of its workers.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(_TIMEOUT_S)
    size, descriptors, _, _ = socket.recv_fds(connection, 8, 2)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += connection.recv(65536)
    for descriptor, inherited in enumerate(descriptors, start=1):
        os.dup2(inherited, descriptor)
        os.close(inherited)
    request = json.loads(content)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])

    import numpy as np
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.utils import update_envs

    np.random.seed()  # Python's own generator does so by itself.
    arguments = []
    context = RuntimeEnvContext()
    for argument in request["arguments"]:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = RuntimeEnvContext.deserialize(value)
        elif name != "--language":
            arguments.append(argument)
    update_envs(context.env_vars)
    del sys.path[0]  # This file's.
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:0] = [os.path.dirname(arguments[0]), *added]
    sys.argv = arguments
    main = ModuleType("__main__")
    main.__file__ = arguments[0]
    sys.modules["__main__"] = main
    with open(arguments[0], encoding="utf-8") as file:
        exec(compile(file.read(), arguments[0], "exec"), main.__dict__)
    raise SystemExit


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        _serve()
    else:
        _ask_for_a_worker()
