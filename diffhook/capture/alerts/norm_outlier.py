"""A gradient far longer than others at its timestep."""

from diffhook.capture.alerts.detector import register
from diffhook.capture.alerts.outlier import Outlier


@register
class NormOutlier(Outlier):
    """Names samples whose gradient norm is far above that of others at similar timesteps."""

    kind = "norm-outlier"

    column = "grad_norm"
    words = "has {:.1f} times the typical gradient norm"
