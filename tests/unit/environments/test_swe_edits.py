import difflib
import random
import subprocess

import pytest

from millrace.environments.swe.edits import Edit, EditError, NotParsed, apply_edits, parse_edits

CART = """\
class Cart:
    def total(self):
        return self.price

    def tax(self):
        return self.price
"""
FILES = {"shop/cart.py": CART, "README.md": "# Shop\n"}


def block(path, old, new):
    return f"### {path}\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE\n"


def applied(text, files=FILES):
    return apply_edits(files, parse_edits(text))


def test_a_block_replaces_the_lines_that_it_finds():
    text = (
        "I see.\n```python\n"
        + block("shop/cart.py", "    def tax(self):\n        return self.price", "    def tax(self):\n        return 0")
        + "```\nDone."
    )
    assert applied(text) == {**FILES, "shop/cart.py": CART[::-1].replace("ecirp.fles", "0", 1)[::-1]}


def test_blocks_are_applied_one_after_the_other_and_may_create_a_file():
    text = (
        block("shop/cart.py", "class Cart:", "class Basket:")
        + "<<<<<<< SEARCH\nclass Basket:\n=======\nclass Bag:\n>>>>>>> REPLACE\n"
        + "### `./shop/new.py`\n<<<<<<< SEARCH\n=======\nx = 1\n>>>>>>> REPLACE\n"
    )
    result = applied(text)
    assert result["shop/cart.py"].startswith("class Bag:\n") and result["shop/new.py"] == "x = 1\n"


DIFF = """\
diff --git a/shop/cart.py b/shop/cart.py
index 111..222 100644
--- a/shop/cart.py
+++ b/shop/cart.py
@@ -1,3 +1,4 @@ class Cart:
 class Cart:
+    price = 0
     def total(self):
         return self.price
@@ -5,2 +6,2 @@
     def tax(self):
-        return self.price
+        return 0
"""


def test_a_diff_is_applied_where_its_header_says():
    lines = CART.splitlines()
    expected = "\n".join([lines[0], "    price = 0", *lines[1:5], "        return 0", ""])
    assert applied(DIFF)["shop/cart.py"] == expected
    assert applied(f"Here:\n```diff\n{DIFF}```\nThat is all.")["shop/cart.py"] == expected
    assert applied(DIFF.replace("\n", "\r\n"), {"shop/cart.py": CART.replace("\n", "\r\n")})["shop/cart.py"] == expected


def test_a_hunk_with_wrong_numbers_is_applied_at_the_one_place_that_fits():
    moved = DIFF.replace("@@ -5,2 +6,2 @@", "@@ -50,2 +60,2 @@")
    assert applied(moved) == applied(DIFF)
    ambiguous = "--- a/shop/cart.py\n+++ b/shop/cart.py\n@@ -90 +90 @@\n-        return self.price\n+        return 1\n"
    with pytest.raises(EditError, match=r"edit 1 does not apply: what it replaces stands 2 times in shop/cart\.py"):
        applied(ambiguous)


def test_diffs_create_remove_and_move_files():
    text = (
        "--- /dev/null\n+++ b/new.txt\n@@ -0,0 +1,2 @@\n+one\n+two\n"
        "diff --git a/README.md b/README.md\n--- a/README.md\n+++ /dev/null\n@@ -1 +0,0 @@\n-# Shop\n"
        "diff --git a/shop/cart.py b/cart.py\nsimilarity index 90%\nrename from shop/cart.py\nrename to cart.py\n"
        "--- a/shop/cart.py\n+++ b/cart.py\n@@ -1 +1 @@\n-class Cart:\n+class Bag:\n"
    )
    assert applied(text) == {"new.txt": "one\ntwo\n", "cart.py": CART.replace("Cart", "Bag")}
    plain = (
        "--- a/shop/cart.py\n+++ b/cart.py\n@@ -1 +1 @@\n-class Cart:\n+class Bag:\n"
        "@@ -3 +3 @@\n-        return self.price\n+        return 1\n"
    )
    assert applied(plain)["cart.py"].splitlines()[:3] == ["class Bag:", "    def total(self):", "        return 1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I would change the cart.", "no edit in the answer"),
        ("<<<<<<< SEARCH\na\n=======\nb\n>>>>>>> REPLACE", "an edit without the path of its file above"),
        ("### a.py\n<<<<<<< SEARCH\na\n=======\nb\n", "an edit without its line >>>>>>> REPLACE"),
        ("### a.py\n<<<<<<< SEARCH\na\n", "an edit without its line ======="),
        ("@@ -1 +1 @@\n-a\n+b\n", "a hunk without the name of its file above"),
        pytest.param(f"--- a/a\n+++ b/a\n@@ -1 +{'9' * 5000} @@\n-a\n", "number has 5000 digits", id="far away"),
        pytest.param(f"--- a/a\n+++ b/a\n@@ -1,{'9' * 5000} +1 @@\n-a\n", "number has 5000 digits", id="endless"),
        ("--- /dev/null\n+++ /dev/null\n@@ -1 +1 @@\n-a\n+b\n", "a diff without a file"),
        (
            "--- a/a\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n@@ -3 +0,0 @@\n-b\n",
            "a hunk behind the one that removes its file",
        ),
        ("--- /dev/null\n+++ b/a\n@@ -1 +1 @@\n-a\n+b\n", "a diff of a new file with old lines in it"),
    ],
)
def test_what_cannot_be_read_is_said(text, reason):
    with pytest.raises(NotParsed, match=reason):
        parse_edits(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (block("shop/cart.py", "class cart:", "x"), "what it replaces is not in shop/cart.py"),
        (block("shop/cart.py", "class Cart", "x"), "what it replaces is not in shop/cart.py"),
        (block("shop/cart.py", "        return self.price", "x"), "what it replaces stands 2 times in shop/cart.py"),
        (block("cart.py", "class Cart:", "x"), "cart.py is not among the files"),
        ("### README.md\n<<<<<<< SEARCH\n=======\nx\n>>>>>>> REPLACE\n", "it creates README.md, which is there"),
        ("rename from shop/cart.py\nrename to README.md\n", "it moves shop/cart.py to README.md, which is there"),
        (
            "--- a/README.md\n+++ b/README.md\n@@ -9,0 +9,1 @@\n+x\n",
            "it searches for nothing in README.md, which is there",
        ),
        (
            "--- a/README.md\n+++ b/README.md\n@@ -1,0 +0,1 @@\n+x\n",
            "it searches for nothing in README.md, which is there",
        ),
    ],
)
def test_what_does_not_apply_is_said_and_nothing_is_guessed(text, reason):
    with pytest.raises(EditError, match=f"edit 1 does not apply: {reason}"):
        applied(text)


def test_an_edit_that_changes_nothing_is_applied():
    assert applied(block("README.md", "# Shop", "# Shop")) == FILES
    assert apply_edits(FILES, [Edit("README.md", "README.md", ("# Shop",), ("# Shop",))]) == FILES


def test_random_diffs_are_applied_as_git_does(tmp_path):
    rng = random.Random(11)
    for case in range(25):
        before = [rng.choice(["", "a", "b", " c", "-- d", "++ e"]) for _ in range(rng.randrange(1, 40))]
        after = list(before)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(after) + 1)
            after[at : at + rng.randrange(3)] = [rng.choice(["x", "y", "", "-- z"]) for _ in range(rng.randrange(3))]
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / "f").write_text("".join(f"{line}\n" for line in before))
        diff = "\n".join(difflib.unified_diff(before, after, "a/f", "b/f", n=rng.randrange(4), lineterm=""))
        if not diff:
            continue
        command = ["git", "apply", "--unidiff-zero", "--whitespace=nowarn", "-"]
        subprocess.run(command, cwd=folder, input=diff + "\n", text=True, check=True)
        original = {"f": "".join(f"{line}\n" for line in before)}
        assert apply_edits(original, parse_edits(diff)) == {"f": (folder / "f").read_text()}


PIECES = [
    *(
        "### a\n",
        "<<<<<<< SEARCH\n",
        "=======\n",
        ">>>>>>> REPLACE\n",
        "--- a/a\n",
        "+++ b/a\n",
        "--- a/\n",
        "+++ b/\n",
    ),
    *("+++ /dev/null\n", "--- /dev/null\n", "@@ -1 +1 @@\n", "@@ -0,0 +1 @@\n", "@@ -1 +0,0 @@\n", "@@ -9,0 +0 @@\n"),
    *("-x\n", "+y\n", " x\n", "x\n", "\n", "\r\n", "rename from a\n", "rename to b\n", "diff --git a/a b/b\n"),
    *("```diff\n", "```\n", "\\ No newline at end of file\n", "\0", "\ud800"),
]


def test_whatever_is_written_is_an_edit_or_the_reason_why_not():
    rng, applied_edits = random.Random(7), 0
    for _ in range(20_000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 20)))
        try:
            applied_edits += apply_edits({"a": "x\ny\nx\n"}, parse_edits(text)) is not None
        except EditError as error:
            assert str(error)
    assert applied_edits > 50


def test_reading_takes_time_linear_in_the_answer():
    for text in ("<" * 200_000, "### a\n" * 50_000, "--- a\n" * 50_000, "@@ -1 +1 @@\n" * 50_000, "```diff\n" * 20_000):
        with pytest.raises(EditError):
            parse_edits(text)
