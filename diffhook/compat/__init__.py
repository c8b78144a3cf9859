"""What we use of other libraries that they do not promise to keep, a file per library; no such name outside.

Each says why there is no public way. tests/test_compat.py calls all of them, so that a new version which has
moved one fails there, by its name.
"""
