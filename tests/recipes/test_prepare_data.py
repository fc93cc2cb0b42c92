import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "nemotron-cascade-2" / "prepare_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def released(text, **fields):
    """A row as NeMo-Gym writes it; the released files fill the fields of other subsets with null."""
    empty = dict.fromkeys(("instruction_id_list", "schema_str", "options", "expected_answer", "ground_truth"))
    return empty | {"responses_create_params": {"input": [{"role": "user", "content": text}]}} | fields


def following(text):
    return released(text, instruction_id_list=["length_constraints:number_words"], kwargs=[{"num_words": 3}])


def question(text):
    return released(text, options=[{"A": "yes"}, {"B": "no"}], expected_answer="A")


ROWS = {
    "IF-RL": [following(f"write {i}") for i in range(40)],
    "multi-domain-RL": [
        *(question(f"is it {i}?") for i in range(30)),
        *(released(f"json {i}", schema_str="{}", schema_type="json") for i in range(20)),
        *(
            released(f"mail {i}", environment_name="workbench", ground_truth=[{"name": "email", "arguments": "{}"}])
            for i in range(20)
        ),
        released("nothing verifies this"),
    ],
    "SWE-RL": [{"instance_id": f"repo-{i}", "problem_statement": f"broken {i}"} for i in range(10)],
    "MOPD": [
        *(following(f"write {i}") for i in range(40)),
        *(released(f"1+{i}", expected_answer=str(1 + i)) for i in range(3)),
    ],
}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    for pool, rows in ROWS.items():
        write(tmp_path / "Nemotron-Cascade-2-RL-data" / pool / "train.jsonl", rows)
    write(tmp_path / "AceReason-Math.jsonl", [{"problem": f"2+{i}=?", "answer": str(2 + i)} for i in range(20)])
    chats = [
        {
            "context": [{"role": "user", "content": f"hello {i // 2}"}],
            "response1": "first",
            "response2": "second",
            "overall_preference": (-3, 2)[i % 2],
        }
        for i in range(40)
    ]
    write(tmp_path / "HelpSteer3.jsonl", chats)
    return tmp_path


def test_rows_go_to_the_domain_that_can_verify_them_as_they_are(script, data):
    script.main(["--data", str(data), "--held-out", "2"])
    prompts = data / "prompts"
    assert sorted(folder.name for folder in prompts.iterdir()) == [
        "chat",
        "instruction_following",
        "math",
        "stem_mcqa",
        "structured_outputs",
        "swe_agentic",
        "workplace_assistant",
    ]
    expected = {
        "instruction_following": ROWS["IF-RL"],
        "stem_mcqa": ROWS["multi-domain-RL"][:30],
        "structured_outputs": ROWS["multi-domain-RL"][30:50],
        "workplace_assistant": ROWS["multi-domain-RL"][50:70],
        "swe_agentic": ROWS["SWE-RL"],
    }
    for domain, rows in expected.items():
        train, held_out = read(prompts / domain / "train.jsonl"), read(prompts / domain / "held_out.jsonl")
        assert len(held_out) == min(2, len(rows) // 10)
        assert sorted(map(json.dumps, train + held_out)) == sorted(map(json.dumps, rows))


def test_no_prompt_is_on_both_sides_not_even_twice_or_by_the_mopd_set(script, data):
    script.main(["--data", str(data), "--held-out", "4"])
    for domain in ("instruction_following", "chat", "math"):
        folder = data / "prompts" / domain
        held_out = [script.prompt_key(row) for row in read(folder / "held_out.jsonl")]
        assert held_out and len(set(held_out)) == len(held_out)
        assert not set(held_out) & {script.prompt_key(row) for row in read(folder / "train.jsonl")}
    mopd = read(data / "prompts" / "instruction_following" / "mopd.jsonl")
    assert len(mopd) == 36, "the four that are held out are left out here too"
    assert len(read(data / "prompts" / "math" / "mopd.jsonl")) == 3
    assert len(read(data / "prompts" / "chat" / "train.jsonl")) == 40 - 2 * 2, "each chat stands twice"


def test_the_same_prompts_are_held_out_whatever_the_order(script, data):
    script.main(["--data", str(data), "--held-out", "3"])
    file = data / "prompts" / "instruction_following" / "held_out.jsonl"
    first = sorted(file.read_text().splitlines())
    write(data / "Nemotron-Cascade-2-RL-data" / "IF-RL" / "train.jsonl", ROWS["IF-RL"][::-1])
    script.main(["--data", str(data), "--held-out", "3"])
    assert sorted(file.read_text().splitlines()) == first


def test_rows_that_are_no_prompts_yet_are_rewritten(script, data):
    script.main(["--data", str(data)])
    problem = read(data / "prompts" / "math" / "train.jsonl")[0]
    assert problem["prompt"].startswith("2+") and "\\boxed{}" in problem["prompt"] and problem["answer"]
    chats = read(data / "prompts" / "chat" / "train.jsonl")
    assert chats[0]["prompt"][0]["role"] == "user"
    assert {row["reference"] for row in chats} == {"first", "second"}


def test_what_is_absent_or_cannot_be_verified_is_said(script, data, caplog):
    (data / "HelpSteer3.jsonl").unlink()
    with caplog.at_level("INFO"):
        script.main(["--data", str(data)])
    assert "HelpSteer3.jsonl: not there, left out" in caplog.text
    assert "multi-domain-RL/train.jsonl: left out 1 rows without anything to verify an answer by" in caplog.text
    assert not (data / "prompts" / "chat").exists()


def test_a_row_without_a_prompt_is_named(script, data):
    file = data / "Nemotron-Cascade-2-RL-data" / "IF-RL" / "train.jsonl"
    write(file, [{"instruction_id_list": ["a"], "responses_create_params": {}}])
    with pytest.raises(SystemExit, match=r"IF-RL/train\.jsonl:1: the row has no prompt"):
        script.main(["--data", str(data)])
    write(data / "AceReason-Math.jsonl", [{"question": "1+1"}])
    write(file, ROWS["IF-RL"])
    with pytest.raises(SystemExit, match=r"AceReason-Math\.jsonl:1: the row has no field 'problem'"):
        script.main(["--data", str(data)])
