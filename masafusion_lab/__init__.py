"""MaSaFusion and optimizable inversion, as a Lightning experiment framework for text-guided image editing."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What a person gave cannot be used: one line that names the value, what is allowed and the remedy."""
