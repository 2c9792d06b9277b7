"""A TCP connection that can be cut, or hold everything back."""

import socket
import threading
from contextlib import suppress

PIECE = 1 << 16


class Proxy:
    """Forwards from a port of its own to `address`. `cut_after`: once so many bytes have come from there, all
    connections are closed, and new ones are let through as before."""

    def __init__(self, address, cut_after=None):
        host, port = address.removeprefix("tcp://").rsplit(":", 1)
        self._to = host, int(port)
        self._cut_after = cut_after
        self._open = []
        self.passed = self.connections = self.cuts = 0
        self._listener = socket.create_server((host, 0))
        self.address = f"tcp://{host}:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def close(self):
        self._listener.close()
        self._cut()

    def _start(self, work, *args):
        threading.Thread(target=work, args=args, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
            except OSError:
                return
            self.connections += 1
            self._open += [client, server]
            self._start(self._forward, client, server, False)
            self._start(self._forward, server, client, True)

    def _forward(self, source, target, is_answer):
        try:
            while data := source.recv(PIECE):
                target.sendall(data)
                if is_answer:
                    self.passed += len(data)
                    if self._cut_after is not None and self.passed >= self._cut_after:
                        self._cut_after = None
                        self.cuts += 1
                        self._cut()
        except OSError:
            pass

    def _cut(self):
        while self._open:
            end = self._open.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
