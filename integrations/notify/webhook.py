"""A sink that posts JSON to a URL."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from diffhook.capture import Alert
from diffhook.errors import ConfigurationError


class Webhook:
    """Posts each alert as JSON: its own fields, and its sentence once more as "text", which is what Slack
    and Mattermost show ("content", for Discord).

    Args:
        url: http or https.
        headers: sent along, such as {"Authorization": "Bearer …"}.
        timeout: seconds for the connection and for each read.

    A redirect is not followed: the headers may hold a password, and the alert would not arrive where it was
    sent. Like any answer but a success it is an error, which the hook tells.

    Raises:
        ConfigurationError: another kind of URL.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, timeout: float = 3.0) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ConfigurationError(f"the webhook {url!r} is no URL; expected http://… or https://…")
        self.url = url
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json", **(headers or {})}

    def __call__(self, alert: Alert) -> None:
        text = f"diffhook, step {alert.step}: {alert.message}"
        body = json.dumps({**alert.to_json(), "text": text, "content": text}).encode()
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        with _OPENER.open(request, timeout=self.timeout):
            pass


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an HTTPError."""


_OPENER = urllib.request.build_opener(_NoRedirects)
