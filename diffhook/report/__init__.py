"""Pictures and pages."""

from diffhook.images import to_image
from diffhook.report.images import Images, find_images, load_images
from diffhook.report.page import write_page

__all__ = ["Images", "find_images", "load_images", "to_image", "write_page"]
