"""A sink that posts JSON to a URL."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping
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
        with urllib.request.urlopen(request, timeout=self.timeout):
            pass
