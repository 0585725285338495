"""What the user asked for, parsed once into frozen objects that remember where each value came from."""
