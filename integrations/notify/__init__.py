"""Sinks that take alerts to somebody else: trackers, a webhook, and all that Apprise knows.

    DiffHook(accelerator, path, alerts=Alerts(sinks=[to_logging, Webhook("https://…"), Apprise("tgram://…")]))

Any callable that takes an Alert is a sink as well. ``SampleTables(hook, every=500)`` shows trackers the table
of ``diffhook watch``.
"""

from diffhook.capture.alerts import to_logging
from diffhook.integrations.notify.apprise import Apprise
from diffhook.integrations.notify.tables import SampleTables
from diffhook.integrations.notify.trackers import Trackers
from diffhook.integrations.notify.webhook import Webhook

__all__ = ["Apprise", "SampleTables", "Trackers", "Webhook", "to_logging"]
