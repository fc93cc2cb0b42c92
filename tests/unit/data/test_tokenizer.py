import json
from pathlib import Path

import pytest
from chat_checkpoints import CHATML, THINKING_ONCE, checkpoint, shown
from tiny_checkpoints import IM_END, PAD, VOCABULARY

from millrace.data.errors import DataError
from millrace.data.tokenizer import ChatTokenizer

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
TURNS = [USER, FOUR, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "\n6"}]


def trained(tokenizer: ChatTokenizer, messages: list[dict], **form: object) -> list[list[str]]:
    """The trained stretches of each training sequence as text."""
    sequences = tokenizer.render_conversation(messages, **form)
    return [
        [piece.partition("]]")[0] for piece in shown(tokenizer, sequence).split("[[")[1:]] for sequence in sequences
    ]


def test_a_prompt_ends_where_the_assistant_answers(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    tokens = tokenizer.render_prompt([USER])
    assert tokenizer.decode(tokens, skip_special=False) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_loss_is_on_assistant_tokens_and_their_end_of_turn_only(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    (sequence,) = tokenizer.render_conversation(TURNS)
    assert shown(tokenizer, sequence) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n[[\n6<|im_end|>]]"
    )
    assert len(sequence.tokens) == len(sequence.loss_mask)


def test_a_conversation_starts_with_exactly_the_ids_of_its_prompt(tmp_path: Path) -> None:
    # "\n\n" is one token of this tokenizer, so that whole-text tokenisation would merge prompt and answer.
    tokenizer = ChatTokenizer(checkpoint(tmp_path, merges=["Ċ Ċ"]), VOCABULARY)
    assert len(tokenizer.encode("\n\n")) == 1
    prompt = tokenizer.render_prompt(TURNS[:1])
    (sequence,) = tokenizer.render_conversation([USER, {"role": "assistant", "content": "\n6"}])
    assert sequence.tokens == [*prompt, *b"\n6", tokenizer.end_of_turn_id]
    assert sequence.loss_mask == [False] * len(prompt) + [True] * 3


def test_an_answer_that_merges_with_its_prompt_in_later_prompts_is_not_gone_on_with(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path, merges=["Ċ Ċ"]), VOCABULARY)
    merging = [USER, {"role": "assistant", "content": "\n6"}, *TURNS[:2]]
    first, second = tokenizer.render_conversation(merging)
    prompt = tokenizer.render_prompt(merging[:3])
    assert second.tokens[: len(prompt)] == prompt and prompt[: len(first.tokens)] != first.tokens
    assert len(tokenizer.render_conversation(TURNS[:2] * 2)) == 1


@pytest.mark.parametrize("left_out", [{"weight": 0}, {"train": False}])
def test_messages_are_left_out_of_the_loss_on_demand(tmp_path: Path, left_out: dict) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    first, second = {**FOUR, **left_out}, TURNS[3]
    assert trained(tokenizer, [USER, first, TURNS[2], second]) == [["\n6<|im_end|>"]]
    assert trained(tokenizer, [USER, FOUR, TURNS[2], {**second, **left_out}]) == [["4<|im_end|>"]]
    (whole,) = tokenizer.render_conversation(TURNS)
    (sequence,) = tokenizer.render_conversation([USER, first, TURNS[2], {**second, "train": True, "weight": 1}])
    assert sequence.tokens == whole.tokens, "what is left out of the loss is still read"


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


def test_a_template_that_rewrites_history_gives_a_sequence_for_each_turn(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path, FORGETFUL), VOCABULARY)
    first, second = tokenizer.render_conversation(TURNS)
    assert shown(tokenizer, first) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[<think></think>4<|im_end|>]]"
    )
    assert shown(tokenizer, second) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n[[<think></think>\n6<|im_end|>]]"
    )


def test_a_template_that_renders_no_answer_behind_its_own_prompt_is_refused(tmp_path: Path) -> None:
    opening = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = ChatTokenizer(checkpoint(tmp_path, opening), VOCABULARY)
    with pytest.raises(
        DataError, match=r"renders message 1 otherwise than its prompt begins \(.*assistant\\n4<.*name a template"
    ):
        tokenizer.render_conversation(TURNS)
    assert trained(tokenizer, [USER, {"role": "assistant", "content": "<think>\na</think>4"}]) == [
        ["a</think>4<|im_end|>"]
    ]


def test_a_template_with_generation_marks_gives_the_same(tmp_path: Path) -> None:
    marked = CHATML.replace(
        "{{ m['content'] }}<|im_end|>\n",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}",
    )
    assert "{% generation %}" in marked
    tokenizer = ChatTokenizer(checkpoint(tmp_path / "marked", marked), VOCABULARY)
    plain = ChatTokenizer(checkpoint(tmp_path / "plain"), VOCABULARY)
    assert tokenizer.render_conversation(TURNS) == plain.render_conversation(TURNS)


def test_reasoning_of_a_field_stands_in_the_content_where_a_template_reads_no_field(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    thought = {**FOUR, "reasoning_content": "two and two"}
    assert trained(tokenizer, [USER, thought]) == [["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]]
    assert trained(tokenizer, [USER, thought], thinking=False) == [["4<|im_end|>"]]
    inside = {"role": "assistant", "content": "<think> x</think> 4"}
    assert trained(tokenizer, [USER, inside]) == [["<think> x</think> 4<|im_end|>"]], "as it is written"


def test_the_form_of_a_turn_is_told_by_its_reasoning_unless_it_is_given(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path, THINKING_ONCE), VOCABULARY)
    assert trained(tokenizer, [USER, FOUR]) == [["4<|im_end|>"]]
    assert trained(tokenizer, [USER, FOUR], thinking=True) == [["<think>\n\n</think>\n\n4<|im_end|>"]]
    thought = {**FOUR, "reasoning_content": "x"}
    assert trained(tokenizer, [USER, thought]) == [["<think>\nx\n</think>\n\n4<|im_end|>"]]
    assert trained(tokenizer, [USER, thought], thinking=False) == [["4<|im_end|>"]]


def test_thinking_is_refused_for_prompts_of_a_template_with_one_form(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path), VOCABULARY)
    with pytest.raises(DataError, match=r"no thinking and non-thinking form .*thinking: false would change nothing"):
        tokenizer.render_prompt([USER], thinking=False)


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"half of a surrogate pair \(such as .ud800\) in it, which is no character"):
        ChatTokenizer(checkpoint(tmp_path), VOCABULARY).render_prompt([{"role": "user", "content": "smile \ud83d"}])


def test_a_prompt_tells_what_of_the_answer_it_opened(tmp_path: Path) -> None:
    nemotron = ChatTokenizer(checkpoint(tmp_path), VOCABULARY, chat_template="nemotron")
    assert nemotron.answer_opening(nemotron.render_prompt([USER])) == "<think>\n"
    assert nemotron.answer_opening(nemotron.render_prompt([USER], thinking=False)) == ""
    told = {"role": "user", "content": "What does <think> mean?"}
    assert nemotron.answer_opening(nemotron.render_prompt([told], thinking=False)) == ""


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


def test_marks_of_reasoning_and_tool_calls_are_text_even_if_they_are_special_tokens(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, special=("<think>", "</think>", "<tool_call>", "<|other|>"))
    tokenizer = ChatTokenizer(path, VOCABULARY)
    text = "<think>a</think><tool_call>b"
    tokens = tokenizer.encode(text + "<|other|>")
    assert len(tokens) == 6
    assert tokenizer.decode([*tokens, IM_END]) == text


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


def test_a_template_file_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(FORGETFUL)
    path = checkpoint(tmp_path / "model")
    tokenizer = ChatTokenizer(path, VOCABULARY, chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == FORGETFUL and not tokenizer.brings_template
    assert ChatTokenizer(path, VOCABULARY).brings_template
    (path / "chat_template.jinja").write_text(FORGETFUL)
    assert ChatTokenizer(path, VOCABULARY).chat_template == FORGETFUL, "as an export has it"
    with pytest.raises(DataError, match=r"model\.chat_template: .*none\.jinja cannot be read"):
        ChatTokenizer(path, VOCABULARY, chat_template=str(tmp_path / "none.jinja"))


def test_a_template_that_takes_a_null_for_text_says_so(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(checkpoint(tmp_path, CHATML.replace("m['content']", "'' + m['content']")), VOCABULARY)
    # transformers 5.24 leaves a null out of the message.
    reason = "(can only concatenate str|'dict object' has no attribute 'content')"
    with pytest.raises(DataError, match=f"refuses the messages: {reason}"):
        tokenizer.render_conversation([USER, {"role": "assistant", "content": None, "tool_calls": []}])


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
