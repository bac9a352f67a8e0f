"""`GET /v1/models` and `/v1/models/{id}`: what the caller's key may ask for, with prices."""

from __future__ import annotations

from fastapi import APIRouter

from functions.deps import Identified, Offered, Services
from functions.responses import JSONBytes
from shared.catalog import Deployment, Listing
from shared.errors import ModelNotFound
from shared.router import may_use
from shared.schema import JSON
from shared.state import Switches
from shared.store.base import VirtualKey

router = APIRouter(tags=["models"])
NANO = 10**9


@router.get("/models", response_model=None)
async def list_models(key: Identified, services: Offered) -> JSONBytes:
    """Aliases, and every known model of the providers that are on."""
    created, switches = int(services.started), await current(services)
    data = [shown(listing, created, switches) for listing in services.catalog.models() if visible(listing, key)]
    return JSONBytes({"object": "list", "data": data})


@router.get("/models/{name:path}", response_model=None)
async def retrieve_model(name: str, key: Identified, services: Offered) -> JSONBytes:
    """One model or alias; a model that is not listed but can be asked for is shown too."""
    listing = services.catalog.listing(name)
    if not visible(listing, key):
        raise ModelNotFound(f"The model '{name[:128]}' does not exist or this key may not use it.", param="model")
    return JSONBytes(shown(listing, int(services.started), await current(services)))


async def current(services: Services) -> Switches:
    state = services.gateway.state
    if state.old:
        await state.read()
    return state.switches


def visible(listing: Listing, key: VirtualKey) -> bool:
    if key.models is not None and not listing.deployments:
        return listing.id in key.models
    return key.models is None or any(may_use(key, listing.id, to) for to in listing.deployments)


def shown(listing: Listing, created: int, switches: Switches) -> JSON:
    """OpenAI's model object, with the gateway's own facts; what is not known is null."""
    first = listing.deployments[0] if listing.deployments and not listing.automatic else None
    owner = (
        "lightrail" if listing.automatic else first.provider.name if first else listing.backends[0].partition("/")[0]
    )
    return {
        "id": listing.id,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "provider": owner,
        "context_window": first.context_window if first else None,
        "supports_streaming": listing.automatic or bool(first and "streaming" in first.capabilities),
        "capabilities": ["chat", "streaming"] if listing.automatic else list(first.capabilities) if first else [],
        "pricing": pricing(first),
        "backends": list(listing.backends),
        "active": any(switches.applied(to).enabled for to in listing.deployments),
    }


def pricing(to: Deployment | None) -> JSON | None:
    """US dollars per thousand tokens; the table counts nano-dollars per million."""
    if to is None or to.price is None:
        return None
    per_thousand = NANO * 1000
    return {
        "input_cost_per_1k": to.price.input / per_thousand,
        "output_cost_per_1k": to.price.output / per_thousand,
        "currency": "USD",
    }
