"""Instructions that are a whole task with one checkable result: `custom:`."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from itertools import pairwise

from millrace.environments.constraints.registry import constraint
from millrace.environments.constraints.sentences import punkt_sentences
from millrace.environments.constraints.text import EDGES, listed, unpunctuated

CAPITALS = listed(
    """
    Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam
    Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana
    Zagreb
    """
)
"""European capitals north of 45 degrees, from north to south."""

AFRICAN_COUNTRIES = 52
"""Lines that a list of Africa's countries must have at least."""

NAPOLEON = range(1769, 1822)
"""The years of his life."""

MONTH_DAYS = (31, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""By the month's number. A month 0 and a day 0 pass, as in IFBench."""

QUESTION = re.compile(r"Question \d+[.|):;]?\s*")
OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w")


@constraint("custom:multiples")
def _multiples_of_seven(text: str) -> bool:
    """From 10 to 50, and no other number."""
    return re.findall(r"\d+", text) == ["14", "21", "28", "35", "42", "49"]


@constraint("custom:mcq_count_length")
def _four_questions(text: str) -> bool:
    """Four questions of five options, each longer than the one before, and nothing before them."""
    questions = [question.strip() for question in QUESTION.split(text) if question.strip()]
    if not text.startswith("Question") or len(questions) != 4:
        return False
    lengths = [_question_length(question) for question in questions]
    return None not in lengths and all(a is not None and b is not None and a < b for a, b in pairwise(lengths))


def _question_length(question: str) -> int | None:
    """Characters of a question before its options, or None when they are not five."""
    lines = [line.strip() for line in question.split("\n")]
    options = [number for number, line in enumerate(lines) if OPTION.match(line)]
    return len(" ".join(lines[: options[0]]).strip()) if len(options) == 5 else None


@constraint("custom:reverse_newline")
def _african_countries(text: str) -> bool:
    """From the line that names Zimbabwe on, the lines fall in the alphabet; which countries they name is free."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip(EDGES))]
    start = next((number for number, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    countries = [_ascii(line) for line in lines[start:]]
    return len(countries) >= AFRICAN_COUNTRIES and countries == sorted(countries, reverse=True)


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


@constraint("custom:word_reverse")
def _bald_eagle_words(text: str) -> bool:
    """The words, read from the last to the first, name the bald eagle."""
    return "bald eagle" in " ".join(reversed(unpunctuated(text.lower()).split()))


@constraint("custom:character_reverse")
def _bald_eagle_letters(text: str) -> bool:
    return "elgae dlab" in text.lower()


@constraint("custom:sentence_alphabet")
def _alphabet_story(text: str) -> bool:
    """26 sentences that start with the letters of the alphabet in order."""
    return [sentence[0].lower() for sentence in punkt_sentences(text)] == list("abcdefghijklmnopqrstuvwxyz")


@constraint("custom:european_capitals_sort")
def _capitals(text: str) -> bool:
    return [capital.strip() for capital in _ascii(text).split(",") if capital.strip()] == CAPITALS


@constraint("custom:date_format_list")
def _battle_dates(text: str) -> bool:
    """Dates YYYY-MM-DD of Napoleon's lifetime, separated by commas."""
    return all(_is_battle_date(date.strip()) for date in text.strip().split(","))


def _is_battle_date(date: str) -> bool:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        return False
    year, month, day = map(int, date.split("-"))
    return year in NAPOLEON and month <= 12 and day <= MONTH_DAYS[month]


@constraint("custom:csv_city")
def _csv_city(text: str) -> bool:
    """Seven rows of five fields below the header."""
    rows = _table(text, ",")
    return len(rows) == 8 and rows[0] == ["ID", "Country", "City", "Year", "Count"] and _all_of_five(rows)


@constraint("custom:csv_special_character")
def _csv_special_character(text: str) -> bool:
    """14 rows below the header, one of them with a quoted field with a special character. Rows behind that one may have
    another number of fields."""
    if not _has_header(text, ("ProductID", "Category", "Brand", "Price", "Stock"), r",[ \t]*"):
        return False
    rows = _table(_with_quotes(text), ",")
    special = next((n for n, row in enumerate(rows[1:], 1) if any(re.match(r'".*[^\d\w\s].*"', f) for f in row)), None)
    return len(rows) == 15 and special is not None and _all_of_five(rows[1 : special + 1])


@constraint("custom:csv_quotes")
def _csv_quotes(text: str) -> bool:
    """Three rows below the header, separated by tabs, each field in double quotes."""
    if not _has_header(text, ("StudentID", "Subject", "Grade", "Semester", "Score"), r"\t *"):
        return False
    rows = _table(_with_quotes(text), "\t")
    fields = [field.strip() for row in rows for field in row]
    return len(rows) == 4 and _all_of_five(rows) and all(f.startswith('"') and f.endswith('"') for f in fields)


def _has_header(text: str, names: tuple[str, ...], separator: str) -> bool:
    header = separator.join(f'(?:{name}|"{name}")' for name in names)
    return re.fullmatch(header, text.split("\n")[0].strip()) is not None


def _with_quotes(text: str) -> str:
    """The text with its quotation marks written so that the reader keeps them in the fields."""
    return text.replace('"', '"""')


def _table(text: str, delimiter: str) -> list[list[str]]:
    """The rows of a table; of one that cannot be read, none."""
    try:
        return list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error:
        return []


def _all_of_five(rows: list[list[str]]) -> bool:
    return all(len(row) == 5 for row in rows)
