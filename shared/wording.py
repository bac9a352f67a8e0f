"""What pydantic finds wrong with a body, in OpenAI's words: message, `param` path and `code`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic_core import ErrorDetails

from shared.errors import InvalidRequest


def missing(param: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


JSON_NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def invalid(error: ErrorDetails, body: Any) -> InvalidRequest:
    """One pydantic error in OpenAI's words: message, `param` path and `code`."""
    param, value = _locate(error["loc"], body)
    context = error.get("ctx", {})
    got = next((name for kind, name in JSON_NAMES.items() if type(value) is kind), "another type")
    match error["type"]:
        case "missing":
            return missing(param)
        case "union_tag_not_found" if isinstance(value, dict):
            return missing(f"{param}.role")
        case "union_tag_invalid":
            tag, tags = str(context.get("tag"))[:64], context.get("expected_tags")
            message = f"Invalid value: '{tag}'. Supported values are: {tags}."
            return InvalidRequest(message, param=f"{param}.role", code="invalid_value")
        case "literal_error" if isinstance(value, str):
            message, code = (
                f"Invalid value: '{value[:64]}'. Supported values are: {context['expected']}.",
                "invalid_value",
            )
        case "greater_than_equal" | "less_than_equal" as kind:
            name, sign, word = ("ge", ">=", "below_min") if kind == "greater_than_equal" else ("le", "<=", "above_max")
            bound = context[name]
            message = f"expected a value {sign} {bound}, but got {value} instead."
            code = f"{'decimal' if isinstance(bound, float) else 'integer'}_{word}_value"
        case "too_short" if not value:
            message, code = "empty array. Expected an array with at least one item.", "empty_array"
        case "too_long":
            message = f"array too long. Expected an array with maximum length {context['max_length']}."
            code = "array_above_max_length"
        case "string_too_long":
            message = f"string too long. Expected a string with maximum length {context['max_length']}."
            code = "string_above_max_length"
        case "string_too_short":
            message, code = "empty string. Expected a string with minimum length 1.", "empty_string"
        case "string_pattern_mismatch":
            message, code = f"string does not match pattern {context['pattern']}.", "invalid_value"
        case "extra_forbidden":
            return InvalidRequest(
                f"Unrecognized request argument supplied: {param[:64]}", param=param[:64], code="unknown_parameter"
            )
        case "value_error" | "finite_number" | "int_parsing_size":
            message, code = f"{context.get('error', 'not an acceptable value')}", "invalid_value"
        case kind:
            wanted = next((name for type_, name in _WANTED.items() if kind.startswith(type_)), "another type")
            return InvalidRequest(
                f"Invalid type for '{param}': expected {wanted}, but got {got} instead.",
                param=param,
                code="invalid_type",
            )
    return InvalidRequest(f"Invalid '{param}': {message}", param=param, code=code)


_WANTED = {
    "string": "a string",
    "literal": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
    "union_tag": "an object",
}


def _locate(loc: tuple[int | str, ...], value: Any) -> tuple[str, Any]:
    """`messages[0].content` and what stands there: pydantic's path without the names of union members."""
    path = ""
    for step in loc:
        match value:
            case list() if isinstance(step, int):
                path, value = f"{path}[{step}]", cast("list[Any]", value)[step]
            case dict() if step in value:
                path, value = f"{path}.{step}", cast("dict[Any, Any]", value)[step]
            case dict() if step == loc[-1]:
                path, value = f"{path}.{step}", None
            case _:
                pass
    return path.removeprefix("."), value
