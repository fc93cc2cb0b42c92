"""Cases of constraints: (instruction id, kwargs, text, whether the text follows)."""

from collections import defaultdict

from millrace.environments.constraints import CONSTRAINTS, find_problem, follows


def require_verdict(case):
    instruction_id, kwargs, text, expected = case
    assert find_problem(instruction_id, kwargs) is None
    assert follows(text, instruction_id, kwargs) is expected


def require_both_verdicts_of_each(module, cases):
    """Every constraint of a module has a text that follows and one that does not."""
    verdicts = defaultdict(set)
    for instruction_id, _, _, expected in cases:
        verdicts[instruction_id].add(expected)
    declared = {id_ for id_, known in CONSTRAINTS.items() if known.follows.__module__.endswith(f".{module}")}
    assert dict(verdicts) == {id_: {True, False} for id_ in declared}
