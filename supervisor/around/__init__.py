"""These modules hang on the core from outside, and could be taken away without a change in it."""
