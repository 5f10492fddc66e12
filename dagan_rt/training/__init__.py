"""Training: synthetic heads, data, losses, recipes and the loop."""
