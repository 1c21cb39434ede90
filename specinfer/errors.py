"""Every error the package raises on purpose.

    SpecInferError
    ├── ConfigError            an option has a value it cannot have
    ├── RequestError           one request cannot be served (the others go on)
    ├── CapacityError          the memory given cannot hold what was asked for
    ├── LawError               a tree's slots do not suit the verifier
    ├── DependencyError        an optional package is missing
    └── ModelError             a model cannot be used
        ├── ModelNotFoundError     no such folder, hub id or zoo name
        ├── UnsupportedModelError  an architecture or a feature we do not compute
        └── CheckpointError        weights missing, truncated, left over or of the wrong shape

A message names the option, the value and the remedy, in one sentence.
"""


class SpecInferError(Exception):
    """The root: catching it catches everything this package raises on purpose."""


class ConfigError(SpecInferError, ValueError):
    """An option has a value it cannot have."""


class RequestError(SpecInferError, ValueError):
    """One request cannot be served; the others go on."""


class CapacityError(SpecInferError):
    """The memory given cannot hold what was asked for."""


class LawError(SpecInferError):
    """A tree's slots do not suit the verifier: verifying it would change the output law."""


class DependencyError(SpecInferError, ImportError):
    """An optional package is missing; the message carries the install line."""


class ModelError(SpecInferError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """No such folder, hub id or zoo name."""


class UnsupportedModelError(ModelError):
    """An architecture, or a feature of one, that we do not compute."""


class CheckpointError(ModelError):
    """Weights are missing, truncated, left over or of the wrong shape."""
