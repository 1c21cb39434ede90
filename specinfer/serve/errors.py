"""What goes wrong, as OpenAI's clients expect to be told: a status and one JSON object."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from specinfer.errors import CapacityError, ConfigError, DependencyError, RequestError
from specinfer.serve.schema import UNSUPPORTED

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    501: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal with a status.

    param  the field of the body it is about; code  a word for programs
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def as_api_error(error: BaseException) -> ApiError:
    """Whatever was raised on the way to an answer, as what the client is told.

    A client learns nothing of the inside of a failure: that is in the log.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server allows", code="timeout")
    if isinstance(error, DependencyError):
        return ApiError(501, str(error), code="not_installed")
    if isinstance(error, RequestError | ConfigError | CapacityError):
        message = str(error)
        code = "context_length_exceeded" if "max_model_len" in message else "invalid_value"
        named = re.match(r"([a-z_]+)(=|:|\.\w| is | must )", message)
        return ApiError(400, message, code=code, param=named[1] if named else None)
    return ApiError(
        500, "the engine failed while it served this request; try again", code="engine_error"
    )


def describe_problems(problems: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """What is wrong with a body.

    problems  pydantic's: type, place and message each. Where several types were tried, the one that
              got furthest into the body is the one that was meant.
    """
    paths = [_path(problem, body) for problem in problems]
    path = max(paths, key=len)
    problem, param = problems[paths.index(path)], "".join(path).removeprefix(".") or None
    kind = problem["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {problem['ctx']['error']}", code="invalid_json")
    if kind == "extra_forbidden" and problem["loc"][-1] in UNSUPPORTED:
        message = f"{param} is not supported: leave it out"
        return ApiError(400, message, code="unsupported_parameter", param=param)
    if kind == "extra_forbidden":
        message = f"unknown parameter: {param}"
        return ApiError(400, message, code="unknown_parameter", param=param)
    message = f"{param}: {problem['msg']}"
    if param is None:
        message = "the body must be a JSON object, sent as Content-Type: application/json"
    return ApiError(400, message, code="invalid_value", param=param)


def _path(problem: Mapping[str, Any], value: Any) -> list[str]:
    """Where in the body the problem is, without the names of the types that were tried there."""
    path = []
    for part in problem["loc"]:
        is_there = (isinstance(value, Mapping) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        is_missing = problem["type"] == "missing" and part == problem["loc"][-1]
        if is_there or (is_missing and part != "body"):
            path.append(f"[{part}]" if isinstance(part, int) else f".{part}")
            value = value[part] if is_there else None
    return path
