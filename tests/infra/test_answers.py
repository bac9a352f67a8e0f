"""What API Gateway refuses by itself reads like what the app refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from shared import errors
from tests.server import ROOT

RESOURCES: dict[str, Any] = yaml.safe_load((ROOT / "infra/resources.yml").read_text())["Resources"]
ANSWERS = {name: each["Properties"] for name, each in RESOURCES.items() if each["Type"].endswith("GatewayResponse")}
CLASSES = {
    "AccessDenied": errors.Forbidden,
    "Default5xx": errors.GatewayError,
    "IntegrationFailure": errors.GatewayError,
    "IntegrationTimeout": errors.UpstreamTimeout,
    "RequestTooLarge": errors.BodyTooLarge,
    "Throttled": errors.RateLimited,
    "UnknownUrl": errors.NotFound,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_it_is_an_openai_error(name: str) -> None:
    (template,) = ANSWERS[name]["ResponseTemplates"].values()
    error = json.loads(template.replace("$context.error.messageString", '"as the platform says it"'))["error"]
    assert list(error) == ["message", "type", "param", "code"]
    if name == "Default4xx":
        assert (error["type"], error["code"]) == ("invalid_request_error", None)
        return
    known = CLASSES[name]
    assert error["type"] == known.type
    assert error["code"] == ("unknown_url" if name == "UnknownUrl" else known.code)
    assert ANSWERS[name].get("StatusCode", str(known.status)) == str(known.status)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_page_may_read_it(name: str) -> None:
    headers = ANSWERS[name]["ResponseParameters"]
    assert headers["gatewayresponse.header.Access-Control-Allow-Origin"] == "'*'"
    assert headers["gatewayresponse.header.Cache-Control"] == "'no-store'"


def test_a_throttled_caller_is_told_when_to_come_back() -> None:
    assert ANSWERS["Throttled"]["ResponseParameters"]["gatewayresponse.header.Retry-After"] == "'1'"
