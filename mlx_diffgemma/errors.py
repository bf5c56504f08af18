"""Errors a user is meant to read: what happened, where, expected and got, what to do."""


class DiffGemmaError(Exception):
    """Any failure this package explains; the commands print it without a traceback."""


class ConfigError(DiffGemmaError):
    """A config, recipe or option that is unknown, inconsistent, or would do nothing."""


class CheckpointError(DiffGemmaError):
    """A checkpoint that is absent, damaged, incomplete, or not a DiffusionGemma."""


class TokenizerError(DiffGemmaError):
    """A tokenizer or chat template that is absent or cannot express what was asked."""


class PromptError(DiffGemmaError):
    """A prompt that is empty where it may not be, or does not fit the context."""


class MemoryLimitError(DiffGemmaError):
    """The model, its context or a budget does not fit the machine's memory."""


class BusyError(DiffGemmaError):
    """A second thread asked a model that is already generating."""


class NoiseError(DiffGemmaError):
    """A recording of noise that is unreadable, or too short for this run."""


class TrainingError(DiffGemmaError):
    """Training data or settings that cannot work, or a loss that is no longer a number."""


class PeerError(DiffGemmaError):
    """A machine that shares the model was lost, or is out of step; this process cannot go on."""
