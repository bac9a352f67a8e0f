"""What the environment says, read once, by each door, and checked: nothing behind the doors looks at `os.environ`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """One field per variable, in lower case; seconds, bytes and days as the names say. An empty variable is unset."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    database_url: str = "sqlite:///lightrail.db"
    table_name: str | None = None
    lr_admin_key: str | None = Field(default=None, min_length=20, repr=False)
    lr_key_pepper: str | None = Field(default=None, min_length=16, repr=False)
    gateway_config: str = "gateway.toml"
    proxy_url: str | None = Field(default=None, repr=False)
    ai_proxy_url: str | None = Field(default=None, repr=False)
    connect_timeout: float = Field(default=3.0, gt=0)
    first_content_timeout: float = Field(default=30.0, gt=0)
    gap_timeout: float = Field(default=30.0, gt=0)
    total_timeout: float = Field(default=600.0, gt=0, le=9000)
    cors_origins: str = ""
    log_level: str = "INFO"
    max_body_bytes: int = Field(default=6291456, gt=0)
    generation_ttl_days: int = Field(default=7, ge=3, le=365)  # less would leave no time to mend a sweep that fails
    round_robin: str = ""
    secrets_path: str | None = Field(default=None, pattern="^/")
    stage: str = "local"
    aws_region: str = Field(default="us-east-1", pattern=r"^[a-z0-9-]{1,32}$")
    aws_lambda_function_name: str | None = None
    provider_variables: Mapping[str, str] = Field(default={}, repr=False)

    @property
    def proxy(self) -> str | None:
        return self.proxy_url or self.ai_proxy_url

    @property
    def on_lambda(self) -> bool:
        return self.aws_lambda_function_name is not None

    @property
    def allowed_origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def round_robin_members(self) -> list[str]:
        return [member.strip() for member in self.round_robin.split(",") if member.strip()]

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Raises pydantic's `ValidationError`, which names the variable and never its value."""
        given = {name.lower(): value for name, value in environ.items() if value}
        variables = {name: value for name, value in environ.items() if value and name.endswith(PROVIDER_SUFFIXES)}
        return cls.model_validate({**given, "provider_variables": variables})


PROVIDER_SUFFIXES = ("_API_KEY", "_BASE_URL")
