"""Sentences, split in the two ways that the public checkers use.

IFEval's sentence count and IFBench go by Punkt (Kiss & Strunk 2006, Computational Linguistics 32(4)) with NLTK's
English model, as NLTK 3.10 applies it; the training constraints of IF-RLVR go by a chain of rules. `punkt_sentences`
is Punkt's decision with the model's abbreviations and frequent sentence starters, without its table of how 20,000 words
are capitalised, which ships apart from NLTK. So the two may differ behind an abbreviation, an initial or an ellipsis:
of 5,245 sentences of language models' answers and their prompts, 41 did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

from millrace.environments.constraints.text import listed

ABBREVIATIONS = frozenset(
    listed(
        """
    a.a a.c a.d a.g a.h a.m a.m.e a.s a.t adm ala ariz aug ave b.f b.v bros c c.i.t c.o.m.b c.v calif chg cie co
    col colo conn corp cos ct d d.c d.h d.w dec dr e e.f e.h e.l e.m f f.g f.j feb fla fri ft g g.d g.f g.k ga
    gen h h.c h.f h.m i.m.s ill inc j.b j.c j.j j.k j.p j.r jan jr k kan ky l l.a l.f l.p lt ltd m m.b.a m.d.c
    m.j maj messrs mg mich minn mr mrs ms n n.c n.d n.h n.j n.m n.v n.y nev nov oct ok okla ore p p.a.m p.m pa
    ph.d prof r r.a r.h r.i r.j r.k r.t rep reps s s.a s.a.y s.c s.g s.p.a s.s sen sep sept sr st sw t t.j tenn
    tues u.k u.n u.s u.s.a u.s.s.r v va vs vt w w.c w.r w.va w.w wash wed wis yr
    """
    )
)
"""Of Punkt's English model, as NLTK 3.10 applies it; `e.g`, `i.e` and `etc` are not among them."""

STARTERS = frozenset(
    listed(
        """
    according although among both but despite even he however i if in indeed instead it many meanwhile moreover
    most nevertheless nonetheless nor separately similarly since so some the there these they this though thus
    under when while yet
    """
    )
)
"""Words that so often open a sentence that one opens even behind an abbreviation."""

CLOSING = "[)\\\";}\\]*:@'({\\[!?‘’“”«»]"
"""Characters that are never part of a word, for Punkt."""

QUOTES = "'‘’“”«»"
MARK = re.compile(rf"[.?!](?={CLOSING}|\Z)")
LAST_WORD = re.compile(rf"({CLOSING}|--)([^)\";}}\]*:@'({{\[!?‘’“”«»]*)\Z")
FIRST_TOKEN = re.compile(rf"--+|[(\"`{{\[:;&#*@)}}\]\-,]|\S+?(?=\Z|{CLOSING}|--|\.\.|,(?:\Z|{CLOSING}))")
NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*\.?")
INITIAL = re.compile(r"[^\W\d]\.")
CLOSERS = re.compile(r"\s*[\"')\]}‘’“”«»]+(?=\s|--|\Z)")


def punkt_sentences(text: str) -> list[str]:
    """The stripped sentences of a text; quotation marks and brackets that close behind a sentence belong to it."""
    sentences, start = [], 0
    for end in _sentence_ends(text):
        if end > start:
            closers = CLOSERS.match(text, end)
            end = closers.end() if closers else end
            sentences.append(text[start:end].strip())
            start = end
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _sentence_ends(text: str) -> Iterator[int]:
    """Where sentences end."""
    chunks = [(match.start(), match.group()) for match in re.finditer(r"\S+", text)]
    for (start, chunk), (_, following) in pairwise([*chunks, (len(text), "")]):
        for end in _candidates(chunk, final=not following):
            after = chunk[end] if end < len(chunk) else following
            if _ends_sentence(chunk[:end], after):
                yield start + end


def _candidates(chunk: str, *, final: bool) -> list[int]:
    """Where a sentence may end within a chunk: behind its last mark that something follows, and behind the mark that it
    opens with."""
    marks = [match.end() for match in MARK.finditer(chunk) if not final or match.end() < len(chunk)]
    return marks[:1] + marks[1:][-1:] if marks[:1] == [1] else marks[-1:]


def _ends_sentence(chunk: str, after: str) -> bool:
    """Punkt's decision for a chunk that ends with a mark, given what comes next."""
    if "?" in chunk or "!" in chunk:
        return True
    cut = LAST_WORD.search(chunk)
    word = cut.group(2) if cut else chunk.lstrip("`&#-,")
    if cut and cut.group(1) in QUOTES:  # only these may open a word
        word = cut.group(1) + word
    token = FIRST_TOKEN.match(after)
    following = token.group() if token else after
    return _period_ends_sentence(word, following)


def _period_ends_sentence(word: str, following: str) -> bool:
    if word == ".":
        return True
    upper, lower = following[0].isupper(), following[0].islower() or following in ";:,.!?"
    opens = upper and following.lower().removesuffix(".") in STARTERS
    name = word[:-1].lower()
    abbreviated = name in ABBREVIATIONS or name.rpartition("-")[2] in ABBREVIATIONS or word.endswith("..")
    if INITIAL.fullmatch(word):
        return not abbreviated and not lower and (opens or not upper)
    if abbreviated:
        return opens
    return not (NUMBER.fullmatch(word) and lower)


KEPT, STOP = "\ue000", "\ue001"  # of the private use area: a dot that ends nothing, and the end of a sentence

STARTS = r"(?:Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|Wherever|(?:He|She|It|They|Their|Our|We|But|However|That|This)\s)"
COMPANY = r"(?:Inc|Ltd|Jr|Sr|Co)"

RULES = tuple(
    (re.compile(pattern), ends)
    for pattern, ends in (
        (r"(?:Mr|St|Mrs|Ms|Dr)\.", ""),
        (r"\.(?:com|net|org|io|gov|edu|me)", ""),
        (r"[0-9]\.[0-9]", ""),
        (r"\.{2,}", STOP),
        (r"Ph\.D\.", ""),
        (r"\s[A-Za-z]\. ", ""),
        (rf"[A-Z]\.[A-Z]\.(?:[A-Z]\.)?(?= {STARTS})", STOP),
        (r"[A-Za-z]\.[A-Za-z]\.[A-Za-z]\.", ""),
        (r"[A-Za-z]\.[A-Za-z]\.", ""),
        (rf" {COMPANY}\.(?= {STARTS})", STOP),
        (rf" {COMPANY}\.", ""),
        (r" [A-Za-z]\.", ""),
    )
)
"""In order: a match's dots end no sentence, but the match itself may."""


def _keep_dots(ends: str, match: re.Match[str]) -> str:
    return match.group().replace(".", KEPT) + ends


def rule_sentences(text: str) -> list[str]:
    """The stripped sentences of a text, by rules for titles, addresses, numbers, dots in a row, initials and companies.
    A mark inside quotation marks ends the sentence behind them. Each `?` and `!` ends one, so that of `Why?!` the `!`
    stands alone."""
    text = f" {text}  ".replace("\n", " ")
    for pattern, ends in RULES:
        text = pattern.sub(partial(_keep_dots, ends), text)
    for inside, outside in ((".”", "”."), ('."', '".'), ('!"', '"!'), ('?"', '"?')):
        text = text.replace(inside, outside)
    pieces = re.sub(r"([.?!])", rf"\1{STOP}", text).replace(KEPT, ".").split(STOP)
    sentences = [piece.strip() for piece in pieces]
    return sentences if sentences[-1] else sentences[:-1]
