"""Pictures and pages."""

from diffhook.report.images import Images, data_uri, load_images, to_image
from diffhook.report.page import QueryStrip, query_strips, write_page

__all__ = ["Images", "QueryStrip", "data_uri", "load_images", "query_strips", "to_image", "write_page"]
