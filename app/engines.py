"""The engine children of one server: started together, closed together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from app.flights.recorder import FlightRecorder
from app.pooling.metrics import PoolMetrics
from app.pooling.model import PoolModel
from app.served import Served
from app.service import Service
from app.startup_log import progress_log
from app.telemetry.metrics import Metrics
from batching.engine.client import EngineClient
from batching.engine.messages import StepOutput
from batching.engine.pool_client import PoolClient
from config.settings import EngineSettings, ServerSettings


class Engines:
    """`start` once; `close` must follow, also if that failed."""

    def __init__(self) -> None:
        self._clients: list[EngineClient | PoolClient] = []

    async def start(
        self,
        settings: ServerSettings,
        name: str,
        generator: EngineSettings | None,
        pools: Mapping[str, EngineSettings],
    ) -> Served:
        """Launch all children, wait until all serve, and make the models around them.

        `name` is the generator's. Raises `EngineStartError` and `TokenizerError`.
        """
        service = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._start_pool(settings, pool, engine))
                    for pool, engine in pools.items()
                ]
                if generator is not None:
                    service = await self._start_generator(settings, name, generator)
        except ExceptionGroup as failures:  # the others were cancelled, and their children ended
            raise failures.exceptions[0] from None
        return Served(service, [task.result() for task in tasks])

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

    async def _start_generator(
        self, settings: ServerSettings, name: str, engine: EngineSettings
    ) -> Service:
        metrics = Metrics(name)
        flights = FlightRecorder(metrics)

        def on_step(output: StepOutput) -> None:
            metrics.on_step(output)
            flights.on_step(output)

        client = EngineClient(engine, on_step=on_step)
        self._clients.append(client)
        capabilities = await client.start(progress_log())
        return Service.load(settings, client, capabilities, metrics, flights, engine.policy)

    async def _start_pool(
        self, settings: ServerSettings, name: str, engine: EngineSettings
    ) -> PoolModel:
        metrics = PoolMetrics(name)
        client = PoolClient(engine, on_batch=metrics.on_batch)
        self._clients.append(client)
        capabilities = await client.start(progress_log(name))
        return PoolModel.load(settings, client, capabilities, metrics)
