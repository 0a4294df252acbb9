"""Glue for the trainer and evaluator of MONAI."""
