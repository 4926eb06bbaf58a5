"""All that one server serves: at most one model that generates, and any number that pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from app.access.quota import EXCEEDED
from app.http.errors import ApiError, no_such_model
from app.pooling.model import PoolModel
from app.service import Service
from app.telemetry.accounts import Account, Listener, log_account
from batching.worker.pool_protocol import PoolTask
from config.settings import ServerSettings


class Served:
    """The models by name. There is at least one."""

    def __init__(self, generator: Service | None, pools: Sequence[PoolModel] = ()) -> None:
        self.generator = generator
        self.pools = {model.name: model for model in pools}
        # Told of every request that has ended.
        self.listeners: list[Listener] = [log_account, self._count_exceeded]
        self.draining = False  # told to stop: open requests are finished, new ones refused
        if generator is not None:  # so that its endpoints say what others can do
            generator.others.update({model.name: model.abilities for model in pools})

    @property
    def settings(self) -> ServerSettings:
        """The front end's settings, which all models share."""
        model = self.generator or next(iter(self.pools.values()))
        return model.settings

    @property
    def models(self) -> list[Service | PoolModel]:
        """All models, the generating one first."""
        return ([] if self.generator is None else [self.generator]) + list(self.pools.values())

    def pick(self, name: str | None, tasks: Sequence[PoolTask], *, size: int = 0) -> PoolModel:
        """The pooling model called `name`, or the first that does one of `tasks`.

        With `size` a classifier must have so many labels. Raises `ApiError`: 404 for an unknown
        name, 400 for a model that does something else, saying what.
        """

        def fits(model: PoolModel) -> bool:
            c = model.capabilities
            return c.task in tasks and (not size or c.task == "embed" or c.size == size)

        if name is not None and name not in self.pools:
            self._no_such_pool(name)
        able = [model for model in self.pools.values() if fits(model)]
        if name is None and able:
            return able[0]
        model = self.pools.get(name or "")
        if model is not None and fits(model):
            return model
        subject = model or next(iter(self.pools.values()), None)
        if subject is None:
            self._no_such_pool(name)
        self._cannot(f"the model {subject.name!r} only {subject.abilities}", able)

    def refuse_generation(self) -> NoReturn:
        """Raises `ApiError`: there is no generating model."""
        model = next(iter(self.pools.values()))
        self._cannot(f"the model {model.name!r} only {model.abilities}; it cannot generate text")

    def _count_exceeded(self, account: Account) -> None:
        """Quotas are over all models, and ask before one is named: the first counts refusals."""
        if account.error == EXCEEDED:
            self.models[0].admission.rejections[EXCEEDED] += 1

    def _no_such_pool(self, name: str | None) -> NoReturn:
        if self.generator is None:
            raise no_such_model(name or "")
        self.generator.check_model(name)
        self._cannot(
            f"the model {self.generator.model_name!r} generates text and does nothing else",
            list(self.pools.values()),
        )

    def _cannot(self, message: str, able: Sequence[PoolModel] = ()) -> NoReturn:
        if able:
            message += f"; {able[0].name!r} {able[0].abilities}"
        elif not self.pools:
            message += "; an embedding model can be served beside it with --also"
        raise ApiError(message, param="model", code="model_not_suitable")
