"""A sink for mail, chat and the rest, through Apprise."""

from __future__ import annotations

from diffhook.capture import Alert
from diffhook.errors import ConfigurationError

_TYPES = {"info": "info", "warning": "warning", "error": "failure"}


class Apprise:
    """Sends each alert to services that Apprise knows.

    Args:
        urls: Apprise's, such as "mailto://user:password@example.org" or "slack://…".

    Raises:
        ConfigurationError: Apprise is not installed, or does not know a URL.
    """

    def __init__(self, *urls: str) -> None:
        try:
            import apprise
        except ImportError as error:
            raise ConfigurationError(
                "the sink Apprise needs apprise: pip install 'diffhook[apprise]'"
            ) from error
        self._services = apprise.Apprise()
        for url in urls:
            if not self._services.add(url):
                kind = url.partition(":")[0]  # no more of it: there are passwords in such URLs
                raise ConfigurationError(
                    f"Apprise does not know the URL that begins {kind!r}: see its list of services"
                )
        if not urls:
            raise ConfigurationError("Apprise was given no URL; expected at least one")

    def __call__(self, alert: Alert) -> None:
        sent = self._services.notify(
            title=f"diffhook: {alert.kind}, step {alert.step}",
            body=alert.message,
            notify_type=_TYPES[alert.level],
        )
        if not sent:
            raise ConnectionError("Apprise could not reach all of its services")
