"""What a client is told when a request cannot be met: a sentence and a status of its own, never a bare 500."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from monailabel.interfaces.exception import MONAILabelException

from scripts.engines.evaluators import intended_error

WRONG_REQUEST = 400
NOT_THERE = 404
SERVER_ERROR = 500


@contextmanager
def answered() -> Iterator[None]:
    """Turn the errors that a client can mend into answers; every other error goes on as it is.

    Raises:
        HTTPException: 404 for a model, strategy, method or image that is not there, 400 for the bundle's own errors.
    """
    try:
        yield
    except MONAILabelException as error:
        raise HTTPException(NOT_THERE, error.msg) from error
    except Exception as error:
        reason = intended_error(error)
        if reason is None:
            raise
        raise HTTPException(WRONG_REQUEST, str(reason)) from error


async def _refused(_: Request, error: Exception) -> JSONResponse:
    """Answer an error of MONAI Label's endpoints, which call what a client forgot an error of the server."""
    if not isinstance(error, HTTPException):
        return JSONResponse({"detail": f"expected JSON, but {error}"}, WRONG_REQUEST)
    status = WRONG_REQUEST if error.status_code == SERVER_ERROR else error.status_code
    return JSONResponse({"detail": error.detail}, status, headers=error.headers)


def answer_for_endpoints(server: FastAPI) -> None:
    """Let a server answer so for what its endpoints refuse before the app is asked: no image, parameters not in JSON.

    MONAI Label makes the app once the server has started, so its stack is built anew, with the next request.
    """
    server.add_exception_handler(HTTPException, _refused)
    server.add_exception_handler(json.JSONDecodeError, _refused)
    server.middleware_stack = None
