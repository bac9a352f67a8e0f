"""AWS's signature, version 4, with the process's own role, which botocore finds and renews in time.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# botocore has no types
from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, NoCredentialsError
from botocore.session import get_session

from shared.errors import ProviderError
from shared.providers.dialect import Outgoing


async def signed(outgoing: Outgoing) -> dict[str, str]:
    """The headers of a request to Bedrock, signature included; raises ProviderError where there is no role.

    In a thread: the role's keys may have to be fetched, and a long body takes its time to be hashed."""
    return await asyncio.to_thread(_signed, outgoing)


def _signed(outgoing: Outgoing) -> dict[str, str]:
    request: Any = AWSRequest("POST", outgoing.url, dict(outgoing.headers), outgoing.content)
    try:
        SigV4Auth(_role().get_frozen_credentials(), "bedrock", outgoing.region).add_auth(request)
    except BotoCoreError as trouble:
        raise ProviderError("auth", "The gateway has no AWS role to ask the provider with.") from trouble
    return dict(request.headers.items())


@cache
def _role() -> Any:
    """Looked for once, and again only while there is none. It renews itself where it expires."""
    if (found := get_session().get_credentials()) is None:
        raise NoCredentialsError
    return found
