"""This package finds the weights, and downloads them."""
