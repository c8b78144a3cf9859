"""Pictures and pages."""

from diffhook.images import to_image
from diffhook.report.comparison import write_comparison
from diffhook.report.images import find_images, load_images
from diffhook.report.likeness import Images
from diffhook.report.page import write_page

__all__ = ["Images", "find_images", "load_images", "to_image", "write_comparison", "write_page"]
