import asyncio

from asyncrl.wire.keys import Keys
from asyncrl.wire.rpc import RpcClient, RpcServer


def serve(handler):
    """An async context: a server and one client."""

    class Both:
        async def __aenter__(self):
            self.server = RpcServer(handler)
            self.endpoint = self.server.bind(Keys.new())
            self.task = asyncio.create_task(self.server.serve())
            self.client = RpcClient(self.endpoint, "someone")
            await self.client.__aenter__()
            return self

        async def __aexit__(self, *error):
            await self.client.__aexit__(*error)
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.server.close()

    return Both()
