"""The errors this bundle raises on purpose: each says what was expected, what came and what to do.

The command line prints their text as one line and exits with 1; everything else is a defect and keeps its traceback.
"""


class AutoMedSAMError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(AutoMedSAMError):
    """A setting or a combination of settings that cannot work."""


class InputError(AutoMedSAMError):
    """An image, a label or a datalist that is not what it claims to be."""


class PromptError(AutoMedSAMError):
    """A class that is unknown, or not known in the image's modality."""


class CheckpointError(AutoMedSAMError):
    """Weights that are missing, unreadable or of another architecture."""


class StoreError(AutoMedSAMError):
    """Stored embeddings that are missing, damaged or cannot be stored."""


class OutputError(AutoMedSAMError):
    """A place that cannot be written to."""


class TrainingError(AutoMedSAMError):
    """A training run that cannot go on: a loss that is not finite, or too little memory."""
