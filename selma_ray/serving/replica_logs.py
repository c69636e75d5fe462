"""What a replica logs: this package's records beside Ray Serve's, and refusals in one line."""

import logging

from selma_ray.serving.errors import RequestError

__all__ = ["join_serve_logs"]

_SERVE = "ray.serve"


def join_serve_logs() -> None:
    """Let this package's records in a replica go where Ray Serve's go, at the same level; a refusal is no failure there.

    Ray Serve logs whatever a replica raises with its stack, also what a client has done wrong.
    """
    serve_logger, own = logging.getLogger(_SERVE), logging.getLogger("selma_ray")
    own.handlers = list(serve_logger.handlers)
    own.setLevel(serve_logger.level)
    own.propagate = not own.handlers
    if not any(isinstance(each, _Refusals) for each in serve_logger.filters):
        serve_logger.addFilter(_Refusals())


class _Refusals(logging.Filter):
    """Turns the stack of a refusal into a line of level INFO, which is dropped where INFO is not logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is to be logged."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, RequestError):
            return True
        record.exc_info = record.exc_text = None
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = "refused (%d %s): %s", (error.status, error.code, error)
        return logging.getLogger(_SERVE).isEnabledFor(logging.INFO)
