import pytest

from millrace.config.errors import ConfigError
from millrace.config.explain import explain, schema_listing


def test_every_key_is_listed_and_every_leaf_is_documented() -> None:
    listing = {doc.key: doc for doc in schema_listing()}
    assert listing["parallel.tp"].default == "1"
    assert listing["stages.<rl>.steps"].default == "required"
    assert listing["domains.<name>.system_prompt"].type == "text or null"
    undocumented = [doc.key for doc in schema_listing() if not doc.doc and doc.type != "section"]
    assert [key for key in undocumented if not key.endswith(".type") and key != "stages"] == []


def test_a_key_is_explained_by_the_string_below_its_field() -> None:
    assert explain("trainer.recompute").startswith("trainer.recompute  (none | selective | full, default none)")
    assert "Activation recomputation" in explain("trainer.recompute")
    assert "required" in explain("domains.math.train")
    assert "k3" in explain("stages.rl.kl") and "coefficient" in explain("stages.rl.kl")
    assert "stages.<sft>" not in explain("stages.rl.steps")


def test_an_unknown_key_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"the nearest is trainer\.recompute"):
        explain("trainer.recompte")
