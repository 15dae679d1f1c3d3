"""Speed, compared in one go: medians of steps that take turns, and a record of them."""
