"""One capture: it takes the loop's events, and makes rows of finished passes."""
