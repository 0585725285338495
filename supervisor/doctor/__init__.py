"""`supervisor doctor`: what this machine lacks."""
