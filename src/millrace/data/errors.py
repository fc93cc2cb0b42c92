"""What a user can get wrong in data and tokenizers: one sentence that names the place and the way out."""

from millrace.errors import MillraceError


class DataError(MillraceError, ValueError):
    """A data file, row, conversation, sequence or tokenizer cannot be used as it is."""
