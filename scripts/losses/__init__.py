"""What the networks are trained with."""
