"""Bare sockets, for what no client of ours would send."""

from contextlib import asynccontextmanager

import zmq
import zmq.asyncio


@asynccontextmanager
async def raw_peer(endpoint, name, *, server_public=None, client=None):
    """A DEALER connected to `endpoint`; `client` is another pair of keys (public, secret) than the run's, or
    False for none."""
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, name)
    if client is not False:
        public, secret = client or (endpoint.client_public.encode(), endpoint.client_secret.encode())
        socket.curve_serverkey = (server_public or endpoint.server_public).encode()
        socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.connect(endpoint.address)
    try:
        yield socket
    finally:
        socket.close()
