"""The language of a text, as the package langdetect names it; IFEval defines its language constraints by it."""

from __future__ import annotations

from pathlib import Path

import langdetect

langdetect.DetectorFactory.seed = 0  # it samples; without a seed one text can get two verdicts

LONGEST = 20_000
"""Characters that are read. The detector itself stops after 10,000 without addresses and repeated spaces."""

LANGUAGES = frozenset(path.name for path in Path(langdetect.PROFILES_DIRECTORY).iterdir())
"""The codes it knows, such as `en` and `zh-cn`."""


def is_language(text: str, code: str) -> bool:
    """Whether a text is in a language. A text in which the detector finds nothing to go by, such as one of digits,
    counts as being in it, as in IFEval."""
    try:
        return bool(langdetect.detect(text[:LONGEST]) == code)
    except langdetect.LangDetectException:
        return True
