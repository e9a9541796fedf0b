"""One JSON request over HTTP, with a deadline for the whole of it and a limit on what may come back. Standard library alone.

Redirections are not followed: the key goes to the address that was named and to no other.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

#: Bytes of an answer that are read at most.
MOST_BYTES = 4 * 2**20
_PIECE = 2**16


class NoAnswer(Exception):
    """No whole answer came: the connection failed, broke off or took too long; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def post_json(url: str, value: Any, headers: Mapping[str, str], timeout: float) -> Reply:
    """Send ``value``; the reply may have any status.

    Args:
        timeout: seconds for connecting, for each wait, and for the whole.

    Raises:
        NoAnswer: see there.
    """
    ends = time.monotonic() + timeout
    # ASCII: a letter beyond it travels as an escape, whatever the server takes for its encoding.
    request = urllib.request.Request(
        url, json.dumps(value).encode("ascii"), {"Content-Type": "application/json", **headers}, method="POST"
    )
    opener = urllib.request.build_opener(_Stay)
    try:
        try:
            with opener.open(request, timeout=timeout) as answer:
                return Reply(answer.status, _read(answer, ends), _plain(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, _read(error, ends), _plain(error.headers))
    except TimeoutError as error:
        raise NoAnswer(f"no answer within {timeout:g} s") from error
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        raise NoAnswer(f"no answer within {timeout:g} s" if late else f"no connection ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"the connection broke off ({type(error).__name__})") from error


def _plain(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _read(answer: IO[bytes], ends: float) -> bytes:
    pieces, size = [], 0
    read = getattr(answer, "read1", answer.read)  # what has come, so that the deadline is looked at between
    while piece := read(_PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_BYTES:
            raise NoAnswer(f"the answer is longer than {MOST_BYTES:,} bytes")
        if time.monotonic() > ends:
            raise TimeoutError
    body = b"".join(pieces)
    length = getattr(answer, "headers", {}).get("Content-Length")
    if length is not None and length.isdigit() and size < int(length):
        raise NoAnswer(f"the answer broke off after {size:,} of {int(length):,} bytes")
    return body
