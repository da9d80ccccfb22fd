"""The named exceptions of the library: each message is one sentence that names the thing and the way out."""

from __future__ import annotations

AGAIN = "get the file again, or from its publisher"  # the way out of a damaged one


class TpdneError(Exception):
    """Base of everything this library raises on purpose."""


class SeedError(TpdneError):
    """A seed, a range or a list of seeds that is not one."""


class SettingsError(TpdneError):
    """A setting outside its range, or one that the model does not have."""


class ModelNotFoundError(TpdneError):
    """No generator of that name is installed and no such file exists."""


class CheckpointError(TpdneError):
    """A file that is damaged, unsafe, or not a generator."""


class DeviceError(TpdneError):
    """A device or precision that this machine does not have, or memory that it has run out of."""


class OutputError(TpdneError):
    """A file or directory that cannot be written, or must not be overwritten."""


class ImageError(TpdneError):
    """An image that cannot be read or encoded."""


class DownloadError(TpdneError):
    """A file that could not be fetched, or is not what it should be."""


class TrainingError(TpdneError):
    """A data set or a run that cannot be trained on."""
