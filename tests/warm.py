"""A `tpdne` that starts at once: a server imports torch once and forks a process for every call.

Real processes with the caller's own standard streams, directory, environment, limits and signals; only the seconds of
importing are spared. What concerns the start itself (locale, closed streams) is tested on a cold one.

    python warm.py serve SOCKET          the server
    python warm.py call SOCKET [ARG...]  the client: as if it were tpdne
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys

LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_AS)


def serve(address: str) -> None:
    """Answer calls until the standard input ends."""
    preload()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(answer(connection))
        connection.close()


def preload() -> None:
    import torch  # noqa: F401
    from PIL import Image

    import tpdne_cli.cli.generate
    import tpdne_cli.fleet
    import tpdne_cli.networks.stylegan2  # noqa: F401

    Image.preinit()


def answer(connection: socket.socket) -> int:
    """Fork the caller's process, tell its number, then how it ended."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    call = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(call, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % pid)
    if hasattr(os, "pidfd_open"):  # a client that is killed with its test takes its process along
        handle = os.pidfd_open(pid)
        if handle not in select.select([handle, connection], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
    connection.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
    return 0


def run(call: dict, streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["environment"])
    for limit, values in zip(LIMITS, call["limits"], strict=True):
        resource.setrlimit(limit, values)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from tpdne_cli.cli import main

    sys.argv = ["tpdne", *call["arguments"]]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def call(address: str, arguments: list[str]) -> None:
    """Be the process that the server forks: pass signals on, end as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    limits = [resource.getrlimit(limit) for limit in LIMITS]
    message = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ), "limits": limits}  # noqa: PTH109
    socket.send_fds(connection, [json.dumps(message).encode()], [0, 1, 2])
    lines = connection.makefile("rb")
    pid = int(lines.readline())
    if path := os.environ.get("WARM_PID"):  # a test wants to kill or to watch the process itself
        with open(path, "w") as file:  # noqa: PTH123
            file.write(f"{pid}\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(lines.readline())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        call(sys.argv[2], sys.argv[3:])
