import json
from pathlib import Path

import pytest
from tiny_checkpoints import IM_END, PAD, VOCABULARY, write_tokenizer

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
TURNS = [USER, FOUR, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "\n6"}]


def checkpoint(path: Path, template: str | None = None, *, merges: list[str] | None = None, **config: object) -> Path:
    """A folder with the byte tokenizer, its chat template replaced and BPE merges added on demand."""
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path)
    (path / "config.json").write_text(json.dumps({"eos_token_id": IM_END, **config}))
    if template is not None:
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    if merges:
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = merges
        tokenizer["model"]["vocab"].update({m.replace(" ", ""): 256 + i for i, m in enumerate(merges)})
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def trained_text(tokenizer: ChatTokenizer, tokens: list[int], mask: list[bool]) -> list[str]:
    """The trained stretches as text."""
    pieces, current = [], []
    for token, in_loss in zip([*tokens, PAD], [*mask, False], strict=True):
        if in_loss:
            current.append(token)
        elif current:
            pieces.append(tokenizer.decode(current, skip_special=False))
            current = []
    return pieces


def test_a_prompt_ends_where_the_assistant_answers(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    tokens = tokenizer.render_prompt([USER])
    assert tokenizer.decode(tokens, skip_special=False) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_loss_is_on_assistant_tokens_and_their_end_of_turn_only(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    tokens, mask = tokenizer.render_conversation(TURNS)
    assert trained_text(tokenizer, tokens, mask) == ["4<|im_end|>", "\n6<|im_end|>"]
    assert tokens[-1] == IM_END and mask[-1] and len(tokens) == len(mask)


def test_a_conversation_starts_with_exactly_the_ids_of_its_prompt(tmp_path: Path) -> None:
    # "\n\n" is one token of this tokenizer, so that whole-text tokenisation would merge prompt and answer.
    tokenizer = ChatTokenizer(checkpoint(tmp_path, merges=["Ċ Ċ"]), VOCABULARY)
    assert len(tokenizer.encode("\n\n")) == 1
    prompt = tokenizer.render_prompt(TURNS[:1])
    tokens, mask = tokenizer.render_conversation([USER, {"role": "assistant", "content": "\n6"}])
    assert tokens[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))
    assert tokens[len(prompt) :] == [*b"\n6", tokenizer.end_of_turn_id]


def test_messages_of_weight_zero_are_left_out_of_the_loss(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    first, second = {**FOUR, "weight": 0}, TURNS[3]
    tokens, mask = tokenizer.render_conversation([USER, first, TURNS[2], second])
    assert trained_text(tokenizer, tokens, mask) == ["\n6<|im_end|>"]
    tokens, mask = tokenizer.render_conversation([USER, FOUR, TURNS[2], {**second, "weight": 0}])
    assert trained_text(tokenizer, tokens, mask) == ["4<|im_end|>"]
    assert tokens[-1] == IM_END, "nothing behind the last trained token is kept"


def test_a_conversation_without_a_trained_message_is_refused(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    for messages in ([], [USER], [USER, {**FOUR, "weight": 0}]):
        with pytest.raises(DataError, match="no assistant message to train on"):
            tokenizer.render_conversation(messages)


FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_history_is_refused_and_weight_zero_is_the_way_out(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path, FORGETFUL), VOCABULARY)
    with pytest.raises(DataError, match=r'renders message 1 .* differently once more .*"weight": 0'):
        tokenizer.render_conversation(TURNS)
    tokens, mask = tokenizer.render_conversation([USER, {**FOUR, "weight": 0}, *TURNS[2:]])
    assert trained_text(tokenizer, tokens, mask) == ["<think></think>\n6<|im_end|>"]


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}END{% endgeneration %}REST{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("inside, outside", [("<|im_end|>", ""), ("", "<|im_end|>")])
def test_generation_marks_of_the_template_are_used(tmp_path: Path, inside: str, outside: str) -> None:
    template = MARKED.replace("END", inside).replace("REST", outside)
    tokenizer = ChatTokenizer(checkpoint(tmp_path, template), VOCABULARY)
    assert tokenizer._marks_generation
    tokens, mask = tokenizer.render_conversation(TURNS)
    assert trained_text(tokenizer, tokens, mask) == ["4<|im_end|>", "\n6<|im_end|>"]
    plain = ChatTokenizer(checkpoint(tmp_path / "plain"), VOCABULARY)
    assert (tokens, mask) == plain.render_conversation(TURNS)
    tokens, mask = tokenizer.render_conversation([USER, {**FOUR, "weight": 0}, *TURNS[2:]])
    assert trained_text(tokenizer, tokens, mask) == ["\n6<|im_end|>"]


def test_a_template_may_mark_the_last_generation_only(tmp_path: Path) -> None:
    template = MARKED.replace("END", "<|im_end|>").replace("REST", "")
    template = template.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
    tokenizer = ChatTokenizer(checkpoint(tmp_path, template), VOCABULARY)
    tokens, mask = tokenizer.render_conversation(TURNS)
    assert trained_text(tokenizer, tokens, mask) == ["\n6<|im_end|>"]
    with pytest.raises(DataError, match="marks 1 generations in a conversation with 2 assistant messages"):
        tokenizer.render_conversation([USER, {**FOUR, "weight": 0}, *TURNS[2:]])


def test_stop_ids_are_the_end_of_turn_and_every_declared_eos(tmp_path: Path) -> None:
    assert ChatTokenizer(checkpoint(tmp_path / "a"), VOCABULARY).stop_token_ids == (IM_END,)
    base = checkpoint(tmp_path / "b", eos_token_id=[PAD])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [PAD, IM_END]}))
    assert ChatTokenizer(base, VOCABULARY).stop_token_ids == (PAD, IM_END)


def test_decoding_leaves_special_tokens_out_unless_asked(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    tokens = [*tokenizer.encode("Zürich 数"), IM_END]
    assert tokenizer.decode(tokens) == "Zürich 数"
    assert tokenizer.decode(tokens, skip_special=False) == "Zürich 数<|im_end|>"


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ids up to 258, but the model's vocabulary has 258 rows"):
        ChatTokenizer(checkpoint(tmp_path), 258)
    ChatTokenizer(tmp_path, 259)


def test_the_vocabulary_size_is_taken_from_the_checkpoint_when_not_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ids up to 258, but the model's vocabulary has 200 rows"):
        ChatTokenizer(checkpoint(tmp_path / "small", vocab_size=200))
    with pytest.raises(DataError, match=r"config\.json: vocab_size is missing"):
        ChatTokenizer(checkpoint(tmp_path / "none"))
    assert ChatTokenizer(checkpoint(tmp_path / "fits", vocab_size=320)).end_of_turn_id == IM_END


def test_an_eos_id_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eos_token_id 299 is unknown to its tokenizer"):
        ChatTokenizer(checkpoint(tmp_path, eos_token_id=299), VOCABULARY)


def test_a_missing_chat_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(checkpoint(tmp_path, ""), VOCABULARY)


def test_a_template_without_an_end_of_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no special token"):
        ChatTokenizer(checkpoint(tmp_path, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"), VOCABULARY)


def test_a_template_that_refuses_the_messages_says_so(tmp_path: Path) -> None:
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + FORGETFUL
    tokenizer = ChatTokenizer(checkpoint(tmp_path, picky), VOCABULARY)
    with pytest.raises(DataError, match="refuses the messages: no system role"):
        tokenizer.render_prompt([{"role": "system", "content": "x"}, USER])


def test_missing_and_broken_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        ChatTokenizer(tmp_path / "nowhere", VOCABULARY)
    with pytest.raises(DataError, match="has no tokenizer"):
        ChatTokenizer(tmp_path, VOCABULARY)
    path = checkpoint(tmp_path)
    whole = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"tokenizer\.json: not valid JSON .*truncated"):
        ChatTokenizer(path, VOCABULARY)
