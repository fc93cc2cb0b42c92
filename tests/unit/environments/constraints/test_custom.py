import pytest
from constraint_checks import require_both_verdicts_of_each, require_verdict

from millrace.environments.constraints.custom import CAPITALS

PRODUCTS = "ProductID,Category,Brand,Price,Stock\n"
STUDENTS = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"\n'


def questions(*lengths: int) -> str:
    options = "\n".join(f"{letter.upper()}) {letter}" for letter in "abcde")
    return "\n\n".join(f"Question {i}: {'Why' * n}?\n{options}" for i, n in enumerate(lengths, start=1))


CASES = [
    ("custom:multiples", {}, "14,21, 28 35\n42 and 49", True),
    ("custom:multiples", {}, "From 10: 14 21 28 35 42 49", False),
    ("custom:mcq_count_length", {}, questions(1, 2, 3, 4), True),
    ("custom:mcq_count_length", {}, questions(1, 2, 2, 4), False),
    ("custom:mcq_count_length", {}, questions(1, 2, 3), False),
    ("custom:mcq_count_length", {}, "Here they are. " + questions(1, 2, 3, 4), False),
    ("custom:mcq_count_length", {}, questions(1, 2, 3, 4).replace("E) e", ""), False),
    ("custom:reverse_newline", {}, "Here:\nZimbabwe\n" + "\n".join(f"Y{i:02}" for i in range(60, 0, -1)), True),
    ("custom:reverse_newline", {}, "Zimbabwe\n" + "\n".join(f"Y{i:02}" for i in range(60)), False),
    ("custom:reverse_newline", {}, "Zimbabwe\nZambia", False),
    ("custom:word_reverse", {}, "Eagle bald the is symbol national The.", True),
    ("custom:word_reverse", {}, "The national symbol is the bald eagle.", False),
    ("custom:character_reverse", {}, ".elgae dlab eht si tI", True),
    ("custom:character_reverse", {}, "It is the bald eagle.", False),
    ("custom:sentence_alphabet", {}, " ".join(f"{chr(97 + i)}xe fell." for i in range(26)), True),
    ("custom:sentence_alphabet", {}, " ".join(f"{chr(97 + i)}xe fell." for i in range(25)), False),
    ("custom:european_capitals_sort", {}, ", ".join(CAPITALS).replace("Chisinau", "Chișinău"), True),
    ("custom:european_capitals_sort", {}, ", ".join(sorted(CAPITALS)), False),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-18", True),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-31", False),
    ("custom:date_format_list", {}, "1796-13-12", False),
    ("custom:date_format_list", {}, "1896-04-12", False),
    ("custom:date_format_list", {}, "12.4.1796", False),
    ("custom:csv_city", {}, "ID,Country,City,Year,Count\n" + "1,a,b,2,3\n" * 7, True),
    ("custom:csv_city", {}, "ID,Country,City,Year,Count\n" + "1,a,b,2,3\n" * 6, False),
    ("custom:csv_city", {}, "ID,Country,City,Year,Count\n" + "1,a,b,2\n" * 7, False),
    ("custom:csv_city", {}, "1\r2", False),  # the reader refuses it
    ("custom:csv_special_character", {}, PRODUCTS + '1,"a!",b,2,3\n' + "1,a,b,2,3\n" * 13, True),
    ("custom:csv_special_character", {}, PRODUCTS + "1,a!,b,2,3\n" + "1,a,b,2,3\n" * 13, False),
    ("custom:csv_special_character", {}, '1,"a!",b,2,3\n' * 15, False),
    ("custom:csv_quotes", {}, STUDENTS + '"1"\t"a"\t"b"\t"2"\t"3"\n' * 3, True),
    ("custom:csv_quotes", {}, STUDENTS + "1\ta\tb\t2\t3\n" * 3, False),
    ("custom:csv_quotes", {}, STUDENTS + '"1"\t"a"\t"b"\t"2"\t\n' * 3, False),
    ("custom:csv_quotes", {}, '"1"\t"a"\t"b"\t"2"\t"3"\n' * 4, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_results_of_whole_tasks_are_checked(case):
    require_verdict(case)


def test_every_custom_constraint_has_cases_of_both_verdicts():
    require_both_verdicts_of_each("custom", CASES)
