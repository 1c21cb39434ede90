"""What goes wrong, as OpenAI's clients expect to be told: a status and one JSON object."""

import re
from collections.abc import Mapping
from typing import Any

from specinfer.errors import CapacityError, ConfigError, DependencyError, RequestError

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
        named = re.match(r"([a-z_]+)(=|:| is | must )", message)
        return ApiError(400, message, code=code, param=named[1] if named else None)
    return ApiError(
        500, "the engine failed while it served this request; try again", code="engine_error"
    )
