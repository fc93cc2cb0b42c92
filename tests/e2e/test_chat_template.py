"""A run in the format of Nemotron: what it trains on, and what its export is used with."""

from real_runs import SFT, output, run, write_recipe, write_rows, write_world
from tiny_checkpoints import VOCABULARY

from millrace.data.tokenizer import ChatTokenizer


def test_a_run_trains_on_sequences_of_the_named_template_and_exports_it(tmp_path):
    world = write_world(tmp_path)
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r", "content": "a"}]
    write_rows(world / "chat.jsonl", [{"messages": turn * 2}] * 4)
    model = {"path": "base", "dtype": "float32", "chat_template": "nemotron"}
    stage = {**SFT, "data": ["chat.jsonl"], "steps": 1}
    recipe = write_recipe(world, "chat", stages=[stage], domains=False, model=model, parallel={})
    assert run(recipe) == 0, output(recipe)
    assert "4 conversations, 8 training sequences" in output(recipe)
    named = ChatTokenizer(world / "base", VOCABULARY, chat_template="nemotron")
    exported = ChatTokenizer(world / "runs" / "chat" / "export", VOCABULARY)
    assert exported.brings_template
    assert exported.render_conversation(turn) == named.render_conversation(turn)
