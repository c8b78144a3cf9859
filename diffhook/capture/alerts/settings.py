"""What a user says about alerts, in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffhook.capture.alerts.delivery import Sink
from diffhook.capture.alerts.detector import DEFAULT_RATE, DETECTORS, Detector, all_detectors, checked_rate
from diffhook.capture.alerts.quarantine import Quarantine
from diffhook.capture.alerts.sinks import Brief
from diffhook.capture.alerts.throttle import Throttle
from diffhook.capture.checks import check_choice
from diffhook.errors import ConfigurationError
from diffhook.words import brief


@dataclass(frozen=True)
class Alerts:
    """Who looks for trouble, who is told, and what is done about it.

    Attributes:
        detectors: None for one of each registered kind, at the given rate.
        sinks: callables that take an :class:`Alert`; None for Python's logging, which is told the first of
            each kind in words and then their number, and, in a training run, the accelerator's trackers. The
            log takes every alert, whatever the sinks.
        rate: false alarms that each statistical detector may raise per row (or step) of a run in which
            nothing is wrong.
        quarantine: True, or a :class:`Quarantine`, to leave samples out of the following epochs.
        throttle: True, or a :class:`Throttle`, to multiply the losses of samples whose losses stay far above
            those of others at their timesteps by a factor below 1. It changes the training, also where
            batches come ready-made, of which the quarantine can leave nothing out. Each process
            learns from its own rows; of steps that are not captured, only those whose samples are known are
            throttled. A resumed run learns anew from the rows of its log.
        most: alerts that one detector may raise within 100 steps.
        timeout: seconds after which a sink that does not return is given up.
    """

    detectors: Sequence[Detector] | None = None
    sinks: Sequence[Sink] | None = None
    rate: float = DEFAULT_RATE
    quarantine: bool | Quarantine = False
    throttle: bool | Throttle = False
    most: int = 20
    timeout: float = 5.0

    def __post_init__(self) -> None:
        checked_rate(self.rate)
        for name in ("detectors", "sinks"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Sequence):
                raise ConfigurationError(
                    f"{name} is {brief(value)}; expected a list, or None for the usual ones"
                )
        if not isinstance(self.quarantine, bool | Quarantine):
            raise ConfigurationError(
                f"quarantine is {brief(self.quarantine)}; expected True, False or Quarantine(kinds=...)"
            )
        if not isinstance(self.throttle, bool | Throttle):
            raise ConfigurationError(
                f"throttle is {brief(self.throttle)}; expected True, False or Throttle(rate=..., floor=...)"
            )
        if self.most < 1 or self.timeout <= 0:
            raise ConfigurationError(
                f"most is {self.most} and timeout {self.timeout}; expected at least 1 alert and more than 0 s"
            )
        for detector in self.detectors or ():
            if not isinstance(detector, Detector):
                raise ConfigurationError(
                    f"{detector!r} is no detector; expected objects such as NormOutlier(rate=1e-3)"
                )
        for sink in self.sinks or ():
            if not callable(sink):
                raise ConfigurationError(
                    f"the sink {sink!r} cannot be called; expected a callable of one alert"
                )

    @staticmethod
    def of(given: Alerts | Sequence[Detector] | None, *usual_sinks: Sink) -> Alerts:
        """``DiffHook(alerts=given)`` in full.

        Args:
            given: as the user gave it; a sequence is one of detectors.
            usual_sinks: those of the training run, besides logging, where the user named none.
        """
        if given is not None and not isinstance(given, Alerts | Sequence):
            raise ConfigurationError(
                f"alerts is {given!r}; expected Alerts(...), a sequence of detectors, None for the usual "
                "ones or () for none"
            )
        alerts = given if isinstance(given, Alerts) else Alerts(detectors=given)
        full = replace(
            alerts,
            detectors=all_detectors(alerts.rate) if alerts.detectors is None else list(alerts.detectors),
            sinks=[Brief(), *usual_sinks] if alerts.sinks is None else list(alerts.sinks),
            quarantine=Quarantine() if alerts.quarantine is True else alerts.quarantine,
            throttle=Throttle(alerts.rate) if alerts.throttle is True else alerts.throttle,
        )
        own = any(detector.kind not in DETECTORS for detector in full.detectors or ())
        if isinstance(full.quarantine, Quarantine) and not own:  # which may raise kinds of their own
            for kind in full.quarantine.kinds:
                check_choice("a kind of the quarantine", kind, DETECTORS)
        return full
