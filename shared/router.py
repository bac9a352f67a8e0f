"""Which deployments may answer, in what order. Pure: what it needs to know is its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shared.catalog import Deployment
from shared.errors import Forbidden, UnsupportedParameter
from shared.providers.dialect import Outgoing
from shared.store.base import VirtualKey

MAX_ATTEMPTS = 3


def capable(
    deployments: Sequence[Deployment], prepare: Callable[[Deployment], Outgoing]
) -> tuple[list[Deployment], Outgoing]:
    """Those that can be asked this, from the first that can on, and what the first would be sent.

    Raises the first one's UnsupportedParameter when none can."""
    first: UnsupportedParameter | None = None
    for index, deployment in enumerate(deployments):
        try:
            return list(deployments[index:]), prepare(deployment)
        except UnsupportedParameter as refused:
            first = first or refused
    assert first is not None, "a route has at least one deployment"
    raise first


def permitted(asked: str, deployments: Sequence[Deployment], key: VirtualKey) -> list[Deployment]:
    """Those that the key may use, and, under a money limit, that have a price. Raises Forbidden when none is left."""
    allowed = [to for to in deployments if may_use(key, asked, to)]
    if not allowed:
        raise Forbidden(f"This key may not use the model '{asked}'.", code="model_not_allowed")
    if key.has_money_limit:
        allowed = [to for to in allowed if to.price is not None]
        if not allowed:
            raise Forbidden(
                f"The model '{asked}' has no known price, so a key with a budget cannot use it. "
                "Give it one in gateway.toml.",
                code="model_not_priced",
            )
    return allowed


def may_use(key: VirtualKey, asked: str, to: Deployment) -> bool:
    """A key's list may name an alias, a bare model, a deployment, or all of a provider as `provider/*`."""
    return key.models is None or not {asked, to.id, to.model, f"{to.provider.name}/*"}.isdisjoint(key.models)
