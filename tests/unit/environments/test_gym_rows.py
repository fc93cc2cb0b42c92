import json

import pytest
from environment_runs import environment, score

from millrace.data.datasets import PromptDataset
from millrace.data.errors import DataError
from millrace.environments.gym_rows import GymRowError, plain_row


def request(*messages, **more):
    return {"input": list(messages), "tools": [], "parallel_tool_calls": False, **more}


def user(content):
    return {"role": "user", "content": content}


MATH = {"responses_create_params": request(user("1+1?")), "expected_answer": "2", "agent_ref": {"name": "math_agent"}}
MCQA = {
    "responses_create_params": request(user("Which?")),
    "options": [{"A": "one"}, {"B": "two"}],
    "expected_answer": "B",
    "grading_mode": "strict_single_letter_boxed",
    "uuid": "3c26f339",
    "template_metadata": None,
}
IF = {
    "id": 17616,
    "instruction_id_list": ["last_word:last_word_answer"],
    "prompt": "Tell a story.",
    "kwargs": [{"last_word": "contest", "keyword": None}],
    "responses_create_params": request(user("Tell a story. The last word should be contest.")),
    "agent_ref": {"type": "responses_api_agents", "name": "instruction_following_simple_agent"},
}
SCHEMA = {
    "responses_create_params": request({"role": "system", "content": "Be brief."}, user("Who?")),
    "schema_str": '{"type": "object", "properties": {"name": {"type": "string"}}}',
    "schema_type": "json",
    "schema_fields_count": 1,
}


@pytest.mark.parametrize(
    ("name", "row", "prompt", "good", "bad"),
    [
        ("math", MATH, "1+1?", r"\boxed{2}", r"\boxed{3}"),
        ("mcqa", MCQA, "Which?", r"\boxed{B}", r"\boxed{A}"),
        ("instruction_following", IF, IF["responses_create_params"]["input"][0]["content"], "A contest!", "A match"),
        ("structured_outputs", SCHEMA, "Who?", '{"name": "Ann"}', "{}"),
    ],
)
def test_released_rows_load_and_are_scored_as_they_are(tmp_path, name, row, prompt, good, bad):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    env = environment(name)
    dataset = PromptDataset(path, env.required_fields, env.validate, plain_row)
    assert env.reset(dataset[0])[-1] == {"role": "user", "content": prompt}
    assert [reward.value for reward in score(env, (dataset[0], good), (dataset[0], bad))] == [1.0, 0.0]


def test_a_missing_field_of_a_gym_row_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(MATH) + "\n" + json.dumps({**MATH, "expected_answer": None}) + "\n", encoding="utf-8")
    env = environment("math")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has no field 'answer' \(it has agent_ref, prompt\)"):
        PromptDataset(path, env.required_fields, env.validate, plain_row)


def test_a_request_that_cannot_be_played_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**MATH, "responses_create_params": {}}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: responses_create_params\.input must be a string"):
        PromptDataset(path, ["prompt"], read=plain_row)


def test_messages_are_read_from_every_form_of_input():
    parts = [{"type": "input_text", "text": "One "}, {"type": "input_text", "text": "two"}]
    turns = [
        {"type": "message", "role": "developer", "content": "Be brief.", "status": None},
        user(parts),
        {"role": "assistant", "content": [{"type": "output_text", "text": "Three."}]},
        user("Four?"),
    ]
    assert plain_row({"responses_create_params": request(*turns)})["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One two"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Four?"},
    ]
    text = {"input": "Hello?", "instructions": "Be brief."}
    assert plain_row({"responses_create_params": text})["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
    ]


def test_verifier_metadata_and_nulls_are_read_and_other_rows_are_left_alone():
    newer = {
        "responses_create_params": IF["responses_create_params"],
        "verifier_metadata": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "answer": None,
    }
    row = plain_row(newer)
    assert set(row) == {"prompt", "instruction_id_list", "kwargs"}
    assert environment("instruction_following").validate(row) is None
    assert plain_row({"prompt": "a", "answer": None}) == {"prompt": "a", "answer": None}
    assert plain_row({"prompt": "a", "expected_answer": "1"})["answer"] == "1"
    assert plain_row({"prompt": "a", "expected_answer": "1", "answer": "2"})["answer"] == "2"


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ("x", "responses_create_params must be an object with 'input', not 'x'"),
        ({"input": []}, "input must be a string or a non-empty list of messages, not []"),
        (
            request(user("a"), tools=[{"type": "function", "name": "f"}]),
            "offers 1 tools, but the row has no ground_truth, by which calls are graded; leave the row out",
        ),
        (request(user("a"), tools={"type": "function"}), "tools must be a list of functions, not dict"),
        (request(user("a"), tools=[{"type": "web_search"}]), "tools[0] is no function with a name; leave the row out"),
        (request({"type": "function_call", "name": "f"}), "input[0] is a function_call, but only messages can open"),
        (request("hello"), "input[0] is a str, but only messages"),
        (request({"content": "a"}), "input[0] has no role"),
        (request(user(None)), "input[0].content must be a string or a list of parts, not None"),
        (request(user([{"type": "input_image"}])), "has a part of type 'input_image', but only text can be read"),
    ],
)
def test_what_cannot_be_played_is_named(params, sentence):
    with pytest.raises(GymRowError) as error:
        plain_row({"responses_create_params": params})
    assert sentence in str(error.value)
