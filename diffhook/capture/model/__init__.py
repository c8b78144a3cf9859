"""The user's model outside its training: its adapters, its saved pipeline, samples from it."""
