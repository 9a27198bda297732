"""A change that was decided on an older state is refused: ETag and If-Match on what PATCH changes.

Every answer that shows such a thing has the header `ETag: "<version>"`; a PATCH that sends it back as `If-Match` is
done on that version alone. Without `If-Match` the last one to write wins.
"""

import re
from typing import Final

from fastapi import Request, Response

from gateway.errors import invalid_request

_TAG: Final = re.compile(r'(?:W/)?"(\d{1,18})"')


def etag(response: Response, version: int) -> None:
    """Say in the answer which version it shows."""
    response.headers["ETag"] = f'"{version}"'


def expected_version(request: Request) -> int | None:
    """The version that the caller wants to change; None where any will do.

    Raises:
        ApiError: 400 for an If-Match that is no ETag of ours.
    """
    sent = request.headers.get("if-match")
    if sent is None or sent.strip() == "*":
        return None
    tag = _TAG.fullmatch(sent.strip())
    if tag is None:
        raise invalid_request('If-Match is the ETag of an earlier answer, such as "3".', param="If-Match")
    return int(tag[1])
