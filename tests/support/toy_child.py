"""A child process for tests of the supervisor: it says it is ready, or whatever else `--mode` asks for.

Only the standard library, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import sys
import threading


def serve_health() -> str:
    """Answers every request: not well."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                path = connection.recv(4096).split()[1]
                connection.sendall(b"HTTP/1.1 503 unwell\r\n\r\n")
                print(path.decode(), flush=True)

    threading.Thread(target=answer, daemon=True).start()
    host, port = listener.getsockname()
    return f"{host}:{port}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="serve")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--parent-pid", type=int, default=0)
    parser.add_argument("--address", default="127.0.0.1:1")
    arguments = parser.parse_args()
    if arguments.parent_pid:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != arguments.parent_pid:
            return 1
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print(f"toy says: {arguments.mode}", flush=True)
    if arguments.mode == "fail":
        print("the reason of the failure", flush=True)
        return 3
    if arguments.mode == "silent":
        os.close(arguments.ready_fd)
    elif arguments.mode == "garbage":
        os.write(arguments.ready_fd, b"[1, 2]\n")
    elif arguments.mode != "mute":
        line = {"role": "toy", "address": arguments.address, "pid": os.getpid(), "newer": 1}
        if arguments.mode == "unwell":
            line["http_address"] = serve_health()
        os.write(arguments.ready_fd, json.dumps(line).encode() + b"\n")
    if arguments.mode == "die-soon":
        return 4
    while True:
        number = signal.sigwait(signals)
        if arguments.mode == "stubborn":
            print(f"toy ignores {signal.Signals(number).name}", flush=True)
        else:
            print(f"toy ends by {signal.Signals(number).name}", flush=True)
            return 0


if __name__ == "__main__":
    sys.exit(main())
