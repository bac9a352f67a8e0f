"""Which deployments may answer, in what order. Pure: what it needs to know is its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from shared.catalog import Deployment
from shared.errors import Forbidden, UnsupportedParameter
from shared.providers.dialect import Outgoing
from shared.store.base import VirtualKey

MAX_ATTEMPTS = 3
DEAR_TIERS = frozenset({"priority", "fast", "scale"})
"""https://platform.openai.com/docs/guides/priority-processing: faster, at a price of their own."""


class Candidate(NamedTuple):
    """A deployment, and the name under which the caller came to it: the permission is the name's."""

    asked: str
    to: Deployment


def capable(
    candidates: Sequence[Candidate], prepare: Callable[[Deployment], Outgoing]
) -> tuple[Sequence[Candidate], Outgoing]:
    """Those from the first that can be asked this, and what that one would be sent.

    Raises the first one's UnsupportedParameter when none can."""
    first: UnsupportedParameter | None = None
    for index, candidate in enumerate(candidates):
        try:
            return candidates[index:], prepare(candidate.to)
        except UnsupportedParameter as refused:
            first = first or refused
    assert first is not None, "a route has at least one deployment"
    raise first


def permitted(candidates: Sequence[Candidate], key: VirtualKey, tier: str | None) -> list[Deployment]:
    """Those that the key may use, and, under a money limit, that have a price. Raises Forbidden when none is left.

    `tier`: the `service_tier` asked for; the dearer ones have no price in the table."""
    asked = candidates[0].asked
    allowed = [candidate.to for candidate in candidates if may_use(key, *candidate)]
    if not allowed:
        raise Forbidden(f"This key may not use the model '{asked}'.", code="model_not_allowed")
    if key.has_money_limit:
        allowed = [to for to in allowed if to.price is not None]
        if not allowed or tier in DEAR_TIERS:
            what = f"The service tier '{tier}'" if allowed else f"The model '{asked}'"
            message = f"{what} has no known price, so a key with a budget cannot use it."
            raise Forbidden(message, code="model_not_priced")
    return allowed


def may_use(key: VirtualKey, asked: str, to: Deployment) -> bool:
    """A key's list may name an alias, a bare model, a deployment, or all of a provider as `provider/*`.

    A provider's own id with a slash in it is no bare name: it reads like another provider's deployment."""
    if key.models is None:
        return True
    names = [asked, to.id, f"{to.provider.name}/*"] + ([] if "/" in to.model else [to.model])
    return any(name in key.models for name in names)
