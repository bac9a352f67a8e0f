"""`GET /openapi.json`: FastAPI knows the paths; the bodies, which we parse ourselves, are told here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from shared.schema import JSON, SHAPES, Surface

ANSWERS = {"chat": "ChatCompletion", "completions": "TextCompletion", "embeddings": "EmbeddingList"}
KNOWN_PARTS = ("TextPart", "RefusalPart", "ImagePart", "AudioPart", "FilePart")
REF = "#/components/schemas/{model}"


def _ref(name: str) -> JSON:
    return {"$ref": REF.format(model=name)}


def described(surface: Surface, *, answers: bool = True) -> JSON:
    """The `openapi_extra` of a model route; without `answers`, of one that only takes the same body."""
    if not answers:
        return takes(SHAPES[surface])
    content: JSON = {"application/json": {"schema": _ref(ANSWERS[surface])}}
    if surface != "embeddings":
        content["text/event-stream"] = {"schema": {"type": "string", "description": "data: chunks, then data: [DONE]"}}
    return takes(SHAPES[surface]) | {"responses": {"200": {"description": "The answer", "content": content}}}


def takes(shape: type[BaseModel]) -> JSON:
    """The `openapi_extra` of a route whose body has this shape."""
    TAKEN[shape.__name__] = shape
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _ref(shape.__name__)}}}}


TAKEN: dict[str, type[BaseModel]] = {}


def _object(required: str, **properties: JSON) -> JSON:
    return {"type": "object", "required": required.split(), "properties": properties}


STRING, INTEGER, NUMBER, NULLABLE = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "number"},
    {"type": ["string", "null"]},
)
USAGE = _object(
    "prompt_tokens total_tokens",
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    cost={"type": ["number", "null"], "description": "US dollars; null where no price is known"},
    cost_source={"enum": ["provider", "computed", "estimated", None]},
)
LIGHTRAIL = _object(
    "provider model attempts cache dropped",
    provider=STRING,
    model=STRING,
    attempts=INTEGER,
    cache={"enum": ["hit", "miss", "off"]},
    dropped={"type": "array", "items": STRING},
)
COMMON: JSON = {"id": STRING, "created": INTEGER, "model": STRING, "usage": USAGE, "lightrail": LIGHTRAIL}
CHOICE = _object("index finish_reason", index=INTEGER, finish_reason=STRING, logprobs={"type": ["object", "null"]})
MESSAGE = _object("role content", role={"const": "assistant"}, content=NULLABLE, refusal=NULLABLE)
SHAPES_OUT: JSON = {
    "Error": _object(
        "error", error=_object("message type param code", message=STRING, type=STRING, param=NULLABLE, code=NULLABLE)
    ),
    "ChatCompletion": _object(
        "id object created model choices usage lightrail",
        object={"const": "chat.completion"},
        choices={
            "type": "array",
            "items": {
                **CHOICE,
                "required": [*CHOICE["required"], "message"],
                "properties": {**CHOICE["properties"], "message": MESSAGE},
            },
        },
        **COMMON,
    ),
    "TextCompletion": _object(
        "id object created model choices usage lightrail",
        object={"const": "text_completion"},
        choices={
            "type": "array",
            "items": {
                **CHOICE,
                "required": [*CHOICE["required"], "text"],
                "properties": {**CHOICE["properties"], "text": STRING},
            },
        },
        **COMMON,
    ),
    "EmbeddingList": _object(
        "object data model usage lightrail",
        object={"const": "list"},
        data={
            "type": "array",
            "items": _object(
                "object index embedding",
                object={"const": "embedding"},
                index=INTEGER,
                embedding={"oneOf": [{"type": "array", "items": NUMBER}, STRING]},
            ),
        },
        **COMMON,
    ),
}


def schema(app: FastAPI) -> JSON:
    """The whole document, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components: JSON = made.setdefault("components", {})
        shapes: JSON = components.setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            shapes.pop(name, None)
        shapes |= SHAPES_OUT
        for shape in (*SHAPES.values(), *TAKEN.values()):
            described_shape = shape.model_json_schema(ref_template=REF)
            shapes |= described_shape.pop("$defs", {})
            shapes[shape.__name__] = described_shape
        _tell_apart(shapes)
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        for operations in made["paths"].values():
            for operation in operations.values():
                _finish(operation)
        app.openapi_schema = made
    return app.openapi_schema


def _tell_apart(shapes: JSON) -> None:
    """What pydantic cannot say of our shapes: an unknown part is none of the known; what a patch leaves out stays."""
    known = [shapes[name]["properties"]["type"]["const"] for name in KNOWN_PARTS]
    shapes["OtherPart"]["properties"]["type"]["not"] = {"enum": known}
    for field in shapes["KeyPatch"]["properties"].values():
        field.pop("default", None)


def _finish(operation: dict[str, Any]) -> None:
    operation["responses"].pop("422", None)
    operation["responses"]["default"] = {
        "description": "A refusal",
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    if "open" in operation.get("tags", ()):
        operation["security"] = []
