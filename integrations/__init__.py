"""Adapters between diffhook and the libraries people train with. Imported as diffhook.integrations."""
