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


def test_keys_of_every_type_of_stage_of_judges_and_of_optional_sections_are_explained() -> None:
    listing = {doc.key: doc for doc in schema_listing()}
    assert listing["stages.<mopd>.teachers"].type == "text by name"
    assert listing["stages.<rlhf>.from"].type == "text or null" and "stages.<rlhf>.from_" not in listing
    assert listing["observe.wandb.project"].default == "required" and listing["observe.wandb"].default == "null"
    assert listing["judges.<name>.engine.tensor_parallel"].default == "1"
    assert "The earlier stage whose result it starts from" in explain("stages.evaluate.from")
    assert "checkpoint so far with the highest held-out pass rate" in explain("stages.mopd.teachers")
    assert explain("stages.mopd.samples_per_prompt").startswith(
        "stages.<mopd>.samples_per_prompt  (whole number, default 4)"
    )
    assert "Answers a prompt." in explain("stages.mopd.samples_per_prompt")
    assert "on_failure" in explain("stages.rl.gate") and "custom roles" not in explain("judges.genrm.form")


def test_a_key_of_a_stage_is_explained_for_every_type_that_has_it() -> None:
    text = explain("stages.anything.samples_per_prompt")
    assert [line.split("  ")[0] for line in text.splitlines() if not line.startswith(" ")] == [
        f"stages.<{type_}>.samples_per_prompt" for type_ in ("rl", "rlhf", "mopd")
    ]
