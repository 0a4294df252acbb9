"""From files to tensors and back."""
