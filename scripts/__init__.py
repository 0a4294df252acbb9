"""AutoMedSAM as a MONAI Bundle: medical image segmentation from a class name, without manual prompts."""

__version__ = "0.1.0"
