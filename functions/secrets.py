"""On AWS: the secrets, from SSM's Parameter Store, and the services that are made of them.

`/lightrail/<stage>/<NAME>` is a SecureString named as the variable that it stands for, such as `OPENAI_API_KEY`;
`SECRETS_PATH` is the part before the name. https://docs.aws.amazon.com/systems-manager/latest/userguide/
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from functions.deps import Services, build
from shared.errors import StoreUnavailable
from shared.settings import PROVIDER_SUFFIXES, Settings
from shared.store import open_store
from shared.telemetry import Telemetry, logger

TTL = 300.0
"""Seconds after which a changed secret is effective."""
RETRY = 5.0
"""Seconds between two tries to read them when they cannot be."""
PATIENCE = 30.0
"""The same while the last good ones serve: each try may cost one caller seconds."""
RUSH = 8.0
"""Seconds for which a new environment, which has none yet, asks again where too many are asking at once."""
NONE: Mapping[str, str] = {}


class Secrets:
    """Read in one batch when first asked for. The clock is the wall's, for a frozen process has no other.

    What was read last is good for as long as nothing newer can be."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._client: Any = None
        self._known: Mapping[str, str] | None = None
        self._good = range(0)
        self._asking = asyncio.Lock()

    async def current(self) -> Mapping[str, str]:
        """By name; the same object until one of them has changed. Raises StoreUnavailable where none was ever read."""
        waiting = self._known is None or not self._asking.locked()  # those who have some need not wait for new ones
        if waiting and not self._fresh():
            async with self._asking:
                if not self._fresh():
                    await self._ask()
        if self._known is None:
            headers = {"retry-after": str(int(RETRY))}
            raise StoreUnavailable("The gateway's secrets cannot be read. Please try again.", headers=headers)
        return self._known

    def doubt(self) -> None:
        """They do not suffice: somebody may be putting in the rest at this moment."""
        now = int(self._clock())
        self._good = range(now, now + int(RETRY))

    def _fresh(self) -> bool:
        return int(self._clock()) in self._good  # and not where the clock was set back before it

    async def _ask(self) -> None:
        lasts = TTL
        try:
            found = await asyncio.to_thread(self._fetch)
        except Exception as trouble:  # noqa: BLE001 whatever SSM does, the last good value is served
            logger.error("secrets.unreadable", extra={"path": self._path, "reason": type(trouble).__name__})
            lasts = RETRY if self._known is None else PATIENCE
        else:
            if found != self._known:
                self._known = found
        now = int(self._clock())  # the call itself may have taken seconds
        self._good = range(now, now + int(lasts))

    def _fetch(self) -> dict[str, str]:
        if self._client is None:
            self._client = connect()
        patient_until = self._clock() + (RUSH if self._known is None else 0)
        found: dict[str, str] = {}
        more: dict[str, str] = {}
        while True:
            page = self._page(patient_until, more)
            found |= {each["Name"].rpartition("/")[2]: each["Value"] for each in page["Parameters"]}
            if not page.get("NextToken"):
                return found
            more = {"NextToken": page["NextToken"]}

    def _page(self, patient_until: float, more: Mapping[str, str]) -> Any:
        """An account may ask 40 times a second, and a burst of new environments is more: those wait for their turn."""
        while True:
            try:
                return self._client.get_parameters_by_path(Path=self._path, WithDecryption=True, **more)
            except self._client.exceptions.ClientError as refusal:
                throttled = refusal.response["Error"]["Code"] == "ThrottlingException"
                if not throttled or self._clock() >= patient_until:
                    raise
            time.sleep(random.uniform(0.2, 1.2))  # noqa: S311 apart from the others, which began in the same moment


def connect() -> Any:
    import boto3  # pyright: ignore[reportMissingTypeStubs] it has no types; not at init, nor on a laptop
    from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs] it has no types

    config = Config(connect_timeout=1, read_timeout=2, retries={"mode": "standard", "total_max_attempts": 2})
    client: Any = boto3.client  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return client("ssm", config=config)


def is_secret(name: str) -> bool:
    return name in ("LR_KEY_PEPPER", "LR_ADMIN_KEY") or name.endswith("_API_KEY")


def variables(environ: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
    """The environment with the secrets in it, and no others: on AWS none is ever a plain environment value."""
    named = {
        name: value
        for name, value in secrets.items()
        if is_secret(name) or name.endswith(PROVIDER_SUFFIXES) or name in ("PROXY_URL", "AI_PROXY_URL")
    }
    return {**{name: value for name, value in environ.items() if not is_secret(name)}, **named}


class Current:
    """The services of this process, of the secrets as they are now: made at first use, anew when one has changed.

    Without a `SECRETS_PATH`, of the environment alone. Raises ValueError where the settings are wrong."""

    def __init__(self, environ: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
        self.settings = Settings.read(environ)
        self._environ = environ
        self._store = open_store(self.settings.database_url, self.settings.table_name)
        self._secrets = Secrets(self.settings.secrets_path, clock) if self.settings.secrets_path else None
        self._made_of: Mapping[str, str] | None = None
        self._services: Services | None = None
        Telemetry(self.settings)  # the log's form, also for what comes before the services

    async def __call__(self) -> Services:
        """Raises StoreUnavailable while the secrets cannot be had, or do not suffice."""
        secrets = await self._secrets.current() if self._secrets else NONE
        if self._services is None or secrets is not self._made_of:
            self._made_of, self._services = secrets, self._made(secrets)
        return self._services

    async def forget_connections(self) -> None:
        """Those to providers. Nobody may be using one."""
        if self._services:
            await self._services.upstream.close()

    async def close(self) -> None:
        if self._services:
            await self._services.close()
        await self._store.close()

    def _made(self, secrets: Mapping[str, str]) -> Services:
        """In-flight requests keep theirs; store and connections are taken over."""
        old = self._services
        try:
            settings = Settings.read(variables(self._environ, secrets) if self._secrets else self._environ)
            upstream = old.upstream if old and old.settings.proxy == settings.proxy else None
            new = build(settings, self._store, upstream=upstream)
        except ValueError as wrong:
            logger.error("secrets.insufficient", extra={"path": self.settings.secrets_path, "reason": str(wrong)})
            if old:
                return old
            if self._secrets:
                self._secrets.doubt()
            raise StoreUnavailable("The gateway is not set up: a setting is missing or wrong.") from wrong
        if old is None:
            return new
        new.gateway.answered = old.gateway.answered
        return replace(new, started=old.started)
