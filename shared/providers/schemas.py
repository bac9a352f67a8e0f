"""Schemas that Claude is held to, without what it cannot be held to, as Anthropic's own client sends them.

https://platform.claude.com/docs/en/build-with-claude/structured-outputs#json-schema-limitations: all else is refused.
"""

from __future__ import annotations

import re
from typing import Any, cast

import orjson

from shared.catalog import Deployment
from shared.providers.parameters import Parameters, unsupported
from shared.providers.pieces import object_of
from shared.schema import JSON

REFUSED = frozenset({
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "maxItems", "uniqueItems", "contains", "minContains", "maxContains", "prefixItems", "unevaluatedItems",
    "minProperties", "maxProperties", "patternProperties", "propertyNames", "unevaluatedProperties",
    "dependentRequired", "dependentSchemas", "if", "then", "else", "not", "discriminator",
})  # fmt: skip
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid")
BEYOND_IT = re.compile(r"\(\?|\\[bB1-9]")
"""In a pattern: what looks ahead or back, word boundaries and references to groups."""
BY_NAME = ("properties", "$defs", "definitions")
REFERENCE = ("$ref", "$defs", "definitions")
"""Nothing else may stand beside a reference."""
MOST_REFERENCES = 8
"""From one to the next, at the root."""


class OpenObject(ValueError):
    """A schema has an object whose properties nobody named: Claude could only leave it empty."""


def held(schema: JSON, whose: str, parameters: Parameters, to: Deployment) -> JSON:
    """The schema as Claude takes it; what it is not held to any more is told as dropped: `tools.parameters.minimum`.

    Raises UnsupportedParameter for maps and other objects of any properties."""
    try:
        sent, lost = reduced(schema)
    except OpenObject:
        lacks = "cannot be held to an object whose properties are not named ('additionalProperties')"
        raise unsupported(to, whose.partition(".")[0], lacks) from None
    for name in lost:
        parameters.tell(f"{whose}.{name}")
    return sent


def held_tool(schema: JSON, parameters: Parameters, to: Deployment) -> JSON:
    """The same for what a function takes, which is nothing where nothing is named."""
    nothing: JSON = {"properties": {}} if schema.get("type") == "object" else {}
    return held({**nothing, **schema}, "tools.parameters", parameters, to)


def reduced(schema: JSON) -> tuple[JSON, set[str]]:
    """A copy of which the objects have no further properties, and the keywords that now only stand in descriptions.

    Raises OpenObject."""
    lost = set[str]()
    return _reduced(_rooted(schema), lost), lost


def _rooted(schema: JSON) -> JSON:
    """The root says itself what it is, though it be by reference."""
    for _ in range(MOST_REFERENCES):
        section, _, name = str(schema.get("$ref", "")).removeprefix("#/").partition("/")
        found = object_of(object_of(schema.get(section)).get(name)) if section in REFERENCE else None
        if not found:
            break
        schema = {key: value for key, value in schema.items() if key in BY_NAME[1:]} | found
    return schema


def _reduced(schema: Any, lost: set[str]) -> Any:
    if not isinstance(schema, dict):
        return schema
    given, sent, moved = cast("JSON", schema), JSON(), JSON()
    for name, value in given.items():
        if "$ref" in given and name not in REFERENCE:
            continue
        if _is_refused(name, value):
            moved[name] = value
        elif name in BY_NAME and isinstance(value, dict):
            sent[name] = {key: _reduced(each, lost) for key, each in cast("JSON", value).items()}
        elif name in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
            sent["anyOf" if name == "oneOf" else name] = [_reduced(each, lost) for each in cast("list[Any]", value)]
        else:
            sent[name] = _reduced(value, lost) if name == "items" else value
    lost |= moved.keys() | ({"oneOf"} & given.keys())
    is_object = "object" in (sent.get("type"), *_list(sent.get("type")))
    if is_object and "properties" not in sent and "additionalProperties" not in sent:
        raise OpenObject
    if is_object or "properties" in sent:
        sent["additionalProperties"] = False
    if moved:
        told = ", ".join(f"{name}: {orjson.dumps(value).decode()}" for name, value in moved.items())
        said = sent.get("description")
        sent["description"] = f"{said}\n\n{{{told}}}" if said else f"{{{told}}}"
    return sent


def _is_refused(name: str, value: Any) -> bool:
    match name:
        case "minItems":
            return value not in (0, 1)
        case "format":
            return value not in FORMATS
        case "pattern":
            return BEYOND_IT.search(str(value)) is not None
        case "additionalProperties":
            return value is not False
        case "items":
            return isinstance(value, list)
        case _:
            return name in REFUSED


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
