"""What a token costs: everything side by side in one run, as ratios."""
