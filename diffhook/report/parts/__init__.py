"""The page's parts, one a file: each takes what it shows and returns a section, or None for nothing."""
