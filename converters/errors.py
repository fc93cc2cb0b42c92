"""What goes wrong with a checkpoint's weights, said in one sentence."""

from __future__ import annotations

from millrace.errors import MillraceError


class ConversionError(MillraceError):
    """A tensor or a file that is missing, damaged or of another shape than the model's configuration says."""
