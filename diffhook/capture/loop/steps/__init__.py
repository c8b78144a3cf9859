"""Optimiser steps: which took place, what they changed, how long they took."""
