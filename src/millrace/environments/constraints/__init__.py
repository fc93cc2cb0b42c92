"""Verifiable constraints on a text: does an answer follow an instruction that a program can check?

Known are the 25 instructions of IFEval (Zhou et al. 2023, arXiv:2311.07911), the 29 training ones of IF-RLVR and 56 of
the 58 test ones of IFBench (both Pyatkin et al. 2025, arXiv:2507.02833), by their public ids, keyword arguments and
meaning. A constraint is a pure function of the text and its arguments. Each one is total (it returns for every
string) and takes time about linear in the text, so that no answer of a policy can hang or break the scoring.

`registry` says how a constraint is declared; `sentences`, `tokens` and `language` are what texts are counted with; the
other modules hold the constraints, one module for a group of ids.
"""

from millrace.environments.constraints import (  # noqa: F401  each module registers its constraints
    cases,
    copying,
    counting,
    custom,
    formats,
    keywords,
    layout,
    lengths,
    positions,
    ratios,
    sentence_patterns,
    word_patterns,
)
from millrace.environments.constraints.registry import CONSTRAINTS, find_problem, follows

__all__ = ["CONSTRAINTS", "find_problem", "follows"]
