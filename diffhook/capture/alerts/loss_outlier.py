"""A loss far above others at its timestep."""

from diffhook.capture.alerts.detector import register
from diffhook.capture.alerts.outlier import Outlier


@register
class LossOutlier(Outlier):
    """Names samples whose loss is far above that of others at similar timesteps, where losses are known."""

    kind = "loss-outlier"

    column = "loss"
    words = "has {:.1f} times the usual loss"
