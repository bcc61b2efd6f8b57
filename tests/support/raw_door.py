"""A socket on a local door without our client behind it: says anything, and tells what came back."""

from __future__ import annotations

import mmap
import os
import socket
from typing import Any

from snowskin.kvstore.frames import FrameReader, frame
from snowskin.kvstore.messages import WIRE_VERSION, Request
from snowskin.kvstore.wire import detail_to_error, request_to
from snowskin.v1 import door_pb2

PATIENCE_S = 5.0


class RawDoor:
    """One connection; `with` closes it, but not the mapping of its first pool."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE_S)
        self._socket.connect(address.removeprefix("unix:"))
        self._reader = FrameReader()
        self._responses: list[door_pb2.DoorResponse] = []
        self._descriptors: list[int] = []
        self.pool: mmap.mmap | None = None
        self.ended = False

    def __enter__(self) -> RawDoor:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Bytes as they are; a node that has cut us off already is no error here."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            self.ended = True

    def say(self, request: door_pb2.DoorRequest) -> None:
        """One request in its frame."""
        self.send(frame(request.SerializeToString()))

    def ask(self, call_id: int, request: Request) -> door_pb2.DoorResponse | None:
        """One of the calls that our clients have, and its answer."""
        name, message = request_to(request)
        fields: dict[str, Any] = {name: message}  # a oneof: its name is known at run time
        self.say(door_pb2.DoorRequest(call_id=call_id, **fields))
        return self.response()

    def read_no_more(self) -> None:
        """From now on nobody can send us anything."""
        self._socket.shutdown(socket.SHUT_RD)

    def hello(self, *, maps: bool = False) -> door_pb2.DoorResponse | None:
        """The greeting; its descriptors are closed, the first pool is mapped to be written before that."""
        request = door_pb2.DoorRequest(call_id=1)
        request.hello.wire_version = WIRE_VERSION
        request.hello.client_name = "raw"
        request.hello.access = door_pb2.POOL_ACCESS_WRITE
        self.say(request)
        response = self.response()
        if maps:
            self.pool = mmap.mmap(self._descriptors[0], 0)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        return response

    def response(self) -> door_pb2.DoorResponse | None:
        """The next one; None where the node closed the connection."""
        while not self._responses:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 8)
            except ConnectionResetError:
                data, descriptors = b"", []
            self._descriptors += descriptors
            if not data:
                self.ended = True
                return None
            for payload in self._reader.feed(data):
                response = door_pb2.DoorResponse()
                response.ParseFromString(payload)
                self._responses.append(response)
        return self._responses.pop(0)

    def error(self):
        """The error that comes next, as a client would raise it."""
        response = self.response()
        if response is None:
            return None
        assert response.WhichOneof("response") == "error", response
        return detail_to_error(response.error)
