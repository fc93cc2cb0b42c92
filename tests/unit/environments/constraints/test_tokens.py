import pytest

from millrace.environments.constraints.tokens import tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("They'll save $3,000.50 (or so), won't they?", "They 'll save $ 3,000.50 ( or so ) , wo n't they ?"),
        ("The U.S. is big. It is.", "The U.S. is big . It is ."),
        ('He said "no" and left.', "He said `` no '' and left ."),
        ("It's John's 'idea', I cannot -- gonna try...", "It 's John 's ' idea ' , I can not -- gon na try ..."),
        ("well-known: a/b; 50% @home *bold* <i>", "well-known : a/b ; 50 % @ home * bold * < i >"),
        ("At 10:30, “yes” — no.", "At 10:30 , “ yes ” — no ."),
        ("NATO/UN-led.", "NATO/UN-led ."),
    ],
)
def test_tokens_are_cut_as_the_penn_treebank_has_them(text, expected):
    assert tokens(text) == expected.split()
