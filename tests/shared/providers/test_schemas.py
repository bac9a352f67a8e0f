"""What Claude is held to of a schema, and that the rest is told to it, and to the caller."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from shared.providers.schemas import OpenObject, reduced


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9, description="Left.")]


class Dog(BaseModel):
    kind: Literal["dog"]
    breed: Annotated[str, Field(pattern="^[a-z]+$")] = "mutt"


class Home(BaseModel):
    model_config = ConfigDict(extra="allow")
    pets: Annotated[list[Annotated[Cat | Dog, Field(discriminator="kind")]], Field(max_length=3)]
    phone: str | None = None


def test_what_pydantic_makes_is_taken() -> None:
    given = Home.model_json_schema()
    before = copy.deepcopy(given)
    sent, lost = reduced(given)
    assert given == before
    assert lost == {"minimum", "maximum", "maxItems", "oneOf", "discriminator", "additionalProperties"}
    cat, dog = sent["$defs"]["Cat"], sent["$defs"]["Dog"]
    assert cat["properties"]["lives"] == {
        "type": "integer",
        "title": "Lives",
        "description": "Left.\n\n{maximum: 9, minimum: 1}",
    }
    assert dog == {**before["$defs"]["Dog"], "additionalProperties": False}
    pets = sent["properties"]["pets"]
    assert pets["items"]["anyOf"] == [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]
    assert pets["description"] == "{maxItems: 3}"
    assert sent["properties"]["phone"] == before["properties"]["phone"]
    assert sent["additionalProperties"] is False
    assert reduced(sent) == (sent, set())


FINE: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "minimum": {"type": ["string", "null"], "format": "date", "default": None},
        "names": {"type": "array", "items": {"enum": ["a", 1]}, "minItems": 1},
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "at": {"$ref": "#/$defs/at"},
    },
    "required": ["minimum"],
    "additionalProperties": False,
    "$defs": {"at": {"const": 7}},
}


def test_what_is_fine_stays_as_it_is() -> None:
    assert reduced(FINE) == (FINE, set())


@pytest.mark.parametrize(
    ("schema", "sent", "lost"),
    [
        ({"type": "array", "minItems": 2}, {"type": "array", "description": "{minItems: 2}"}, {"minItems"}),
        ({"type": "string", "format": "ean"}, {"type": "string", "description": '{format: "ean"}'}, {"format"}),
        (
            {"type": "string", "pattern": "^(?!x)"},
            {"type": "string", "description": '{pattern: "^(?!x)"}'},
            {"pattern"},
        ),
        (
            {"type": ["object", "null"], "properties": {}, "additionalProperties": {"type": "integer"}},
            {
                "type": ["object", "null"],
                "properties": {},
                "additionalProperties": False,
                "description": '{additionalProperties: {"type":"integer"}}',
            },
            {"additionalProperties"},
        ),
        (
            {"items": {"$ref": "#/$defs/a", "description": "An a"}, "type": "array"},
            {"items": {"$ref": "#/$defs/a"}, "type": "array"},
            set(),
        ),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
            {
                "type": "array",
                "items": {"$ref": "#/$defs/a"},
                "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}},
            },
            set(),
        ),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
            set(),
        ),
        ({"anyOf": [True, {"multipleOf": 2}]}, {"anyOf": [True, {"description": "{multipleOf: 2}"}]}, {"multipleOf"}),
    ],
)
def test_what_is_refused_is_said(schema: dict[str, Any], sent: dict[str, Any], lost: set[str]) -> None:
    assert reduced(schema) == (sent, lost)


@pytest.mark.parametrize("others", [{}, {"additionalProperties": True}, {"additionalProperties": {"type": "number"}}])
def test_an_object_of_any_properties_is_not_left_empty_instead(others: dict[str, Any]) -> None:
    with pytest.raises(OpenObject):
        reduced({"type": "object", "properties": {"scores": {"type": ["object", "null"], **others}}})
