"""`supervisor doctor` tells what this machine lacks."""
