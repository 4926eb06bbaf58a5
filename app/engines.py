"""The engine children of one server: started together, closed together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from app.startup_log import progress_log
from batching.engine.client import EngineClient
from batching.engine.pool_client import PoolClient
from config.settings import EngineSettings


class Engines:
    """`start` once; `close` must follow, also if that failed.

    `generator` and `pools`, by public name, are what the children are told.
    """

    def __init__(
        self, generator: EngineSettings | None, pools: Mapping[str, EngineSettings]
    ) -> None:
        self.generator = None if generator is None else EngineClient(generator)
        self.pools = {name: PoolClient(engine) for name, engine in pools.items()}
        self._clients: list[EngineClient | PoolClient] = [*self.pools.values()]
        if self.generator is not None:
            self._clients.append(self.generator)

    async def start(self) -> None:
        """Launch all children, and wait until all serve. Raises `EngineStartError`."""
        try:
            async with asyncio.TaskGroup() as group:
                if self.generator is not None:
                    group.create_task(self.generator.start(progress_log()))
                for name, client in self.pools.items():
                    group.create_task(client.start(progress_log(name)))
        except ExceptionGroup as failures:  # the others were cancelled, and their children ended
            raise failures.exceptions[0] from None

    async def close(self) -> None:
        """End all children."""
        await asyncio.gather(*(client.close() for client in self._clients))

    def kill(self) -> None:
        """End all children at once, whatever they do."""
        for client in self._clients:
            client.kill()

    async def given_up(self) -> None:
        """Until no engine serves, nor will."""
        await asyncio.gather(*(client.given_up() for client in self._clients))
