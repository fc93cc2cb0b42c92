"""What a user can get wrong in data and tokenizers: one sentence that names the place and the way out."""


class DataError(ValueError):
    """A data file, row, conversation or tokenizer cannot be used as it is."""
