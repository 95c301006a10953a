"""Requests that cannot be served, with the HTTP status and the code that a client sees."""

from __future__ import annotations

from veneer.errors import VeneerError


class RequestError(VeneerError):
    """A request that is refused. status: of the HTTP answer; param: the field that is wrong."""

    status, code, kind = 400, "invalid_request", "invalid_request_error"
    retry_after: float | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.param = param


class UnknownModel(RequestError):
    """A name that is neither the base's nor an adapter's."""

    status, code = 404, "model_not_found"


class BrokenAdapter(RequestError):
    """An adapter that is there and cannot be served."""

    status, code = 422, "adapter_invalid"


class Overloaded(RequestError):
    """A full queue or a used-up allowance; the same request may succeed later."""

    status, code, kind = 429, "overloaded", "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Unavailable(Overloaded):
    """A server that starts, stops or restarts its engine."""

    status, code, kind = 503, "unavailable", "server_error"


# HTTP status of errors that the engine reports for a request that already ran.
ENGINE_STATUS = {"not_finite": 422, "adapter_invalid": 422, "model_not_found": 404, "engine_failed": 503}
