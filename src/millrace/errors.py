"""The base of every error that a user can mend."""


class MillraceError(Exception):
    """Bad input or a failed part, said in one sentence that names the file, key, rank or engine and the way out.

    Programs print the sentence and exit; any other exception is a defect and keeps its traceback.
    """
