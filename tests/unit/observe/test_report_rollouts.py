import json

import pytest
import torch
from sample_run import write_sample_run
from tokenizers import Tokenizer

from millrace.algorithms.advantages import group_advantages as reference_advantages
from millrace.config.schema import AdvantageConfig
from millrace.observe.report.record import read_run
from millrace.observe.report.rollouts import (
    Bounds,
    evenly,
    group_advantages,
    rollout_data,
    spread_over_domains,
    turn_of_each_token,
)
from millrace.observe.report.tokens import token_texts


@pytest.fixture
def run_dir(tmp_path):
    return write_sample_run(tmp_path)


def stage(data, name):
    return next(one for one in data["stages"] if one["name"] == name)


@pytest.mark.parametrize("text", ["plain text", "≈ 谢谢! ✓ Rhône\n\n", "", "🦀🦀", "<|im_end|>"])
def test_the_texts_of_tokens_make_up_the_answer(run_dir, text):
    tokenizer = Tokenizer.from_file(str(run_dir.parent / "base" / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text


def test_a_character_that_is_cut_off_shows_as_a_replacement(run_dir):
    tokenizer = Tokenizer.from_file(str(run_dir.parent / "base" / "tokenizer.json"))
    ids = tokenizer.encode("a🦀").ids[:-1]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and texts[0] == "a" and set(texts[-1]) == {"�"}


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("rewards", [[1.0, 0.0], [0.3, 0.3, 0.3], [1.0, 0.0, 0.0, 0.0], [0.1, 0.7, 0.2, 0.9, 0.9]])
def test_advantages_without_streams_are_those_of_the_algorithm(rewards, baseline, scale):
    wanted = reference_advantages(torch.tensor([rewards], dtype=torch.float64), baseline=baseline, scale=scale)[0]
    found = group_advantages(rewards, AdvantageConfig(baseline=baseline, scale=scale))
    assert found == pytest.approx(wanted.tolist(), abs=1e-12)


def test_each_token_of_a_taught_answer_has_its_numbers(run_dir):
    data = rollout_data(read_run(run_dir))
    answer = stage(data, "mopd")["steps"][0]["groups"][0]["answers"][0]
    assert len(answer["tokens"]) == len(answer["teacher"]) == len(answer["sampled"]) == answer["length"]
    gaps = [t - s for t, s in zip(answer["teacher"], answer["sampled"], strict=True)]
    assert answer["advantage"] == pytest.approx(gaps, abs=2e-3)


def test_streams_that_were_recorded_go_before_advantages_from_rewards(run_dir):
    file = run_dir / "rollouts" / "if-rl" / "step-000000.jsonl"
    lines = file.read_text().splitlines()
    streams = [{"step": 0}, *({"advantage": float(i)} for i in range(len(lines) - 1))]
    file.with_suffix(".streams.jsonl").write_text("".join(json.dumps(line) + "\n" for line in streams))
    steps = stage(rollout_data(read_run(run_dir)), "if-rl")["steps"]
    assert [a["advantage"] for a in steps[0]["groups"][0]["answers"]] == [0.0, 1.0, 2.0, 3.0]
    rewards = [a["reward"] for a in steps[1]["groups"][0]["answers"]]
    assert [a["advantage"] for a in steps[1]["groups"][0]["answers"]] == pytest.approx(
        group_advantages(rewards, AdvantageConfig()), abs=1e-3
    )


def test_the_first_and_the_last_recorded_step_are_among_the_chosen():
    assert evenly(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert evenly([1, 2], 5) == [1, 2] and evenly([1, 2, 3], 1) == [1]


def test_groups_are_taken_from_all_domains_in_turn():
    groups = [[({"domain": d, "n": n}, {})] for d, count in (("a", 20), ("b", 2), ("c", 9)) for n in range(count)]
    chosen = [(g[0][0]["domain"], g[0][0]["n"]) for g in spread_over_domains(groups, 6)]
    assert chosen == [("a", 0), ("b", 0), ("c", 0), ("a", 19), ("b", 1), ("c", 8)]


def test_a_page_takes_in_no_more_than_its_bounds(run_dir):
    bounds = Bounds(steps=2, groups=3, answers=2, head=6, tail=2, tokens=40, characters=20)
    data = rollout_data(read_run(run_dir), bounds)
    for one in data["stages"]:
        assert len(one["steps"]) == 2 and one["recorded"] == 4
        for step in one["steps"]:
            assert 1 <= len(step["groups"]) <= 3
            for group in step["groups"]:
                assert len(group["answers"]) == 2 and group["of"] == 4
                for answer in group["answers"]:
                    assert len(answer["tokens"]) == len(answer["sampled"]) == 8 and answer["length"] > 8
                    assert answer["head"] == 6 and answer["tokens"][-1] == "<|im_end|>"
                assert "characters left out" in group["messages"][1]["text"]


def test_only_the_beginning_of_a_large_file_is_read(run_dir):
    data = rollout_data(read_run(run_dir), Bounds(file_bytes=1))
    assert all(len(step["groups"]) == 1 for one in data["stages"] for step in one["steps"])


def test_without_a_tokenizer_answers_are_plain_text_and_the_page_says_so(run_dir):
    (run_dir.parent / "base" / "tokenizer.json").unlink()
    data = rollout_data(read_run(run_dir))
    answer = stage(data, "math-rl")["steps"][0]["groups"][0]["answers"][0]
    assert "tokens" not in answer and "boxed" in answer["text"] and "No tokenizer.json" in data["note"]


def test_a_tokenizer_beside_a_checkpoint_serves_as_well(run_dir):
    beside = run_dir / "checkpoints" / "step-00000020" / "hf"
    beside.mkdir(parents=True)
    (run_dir.parent / "base" / "tokenizer.json").rename(beside / "tokenizer.json")
    assert rollout_data(read_run(run_dir))["note"] == ""


def test_steps_that_lie_ahead_of_a_rewound_stage_are_not_shown(tmp_path):
    run_dir = write_sample_run(tmp_path, until="if-rl")
    assert [step["step"] for step in stage(rollout_data(read_run(run_dir)), "if-rl")["steps"]] == [1, 6, 11]


def test_turns_are_told_apart_and_the_environments_tokens_have_no_numbers(run_dir):
    file = run_dir / "rollouts" / "mopd" / "step-000000.jsonl"
    header, first, *others = map(json.loads, file.read_text().splitlines())
    streams = file.with_suffix(".streams.jsonl")
    stream_header, teacher, *more = map(json.loads, streams.read_text().splitlines())
    first |= {"given": [[2, 5]], "masked": True, "cut": "turns"}
    teacher["teacher_logp"] = teacher["teacher_logp"][:2] + teacher["teacher_logp"][5:]
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, first, *others)))
    streams.write_text("".join(json.dumps(line) + "\n" for line in (stream_header, teacher, *more)))
    answer = stage(rollout_data(read_run(run_dir)), "mopd")["steps"][0]["groups"][0]["answers"][0]
    length = answer["length"]
    assert answer["turn"] == turn_of_each_token(length, [[2, 5]]) == [1, 1, 0, 0, 0] + [2] * (length - 5)
    for name in ("sampled", "teacher"):
        assert [value is None for value in answer[name]] == [not turn for turn in answer["turn"]]
    assert answer["teacher"][5] == pytest.approx(teacher["teacher_logp"][2], abs=1e-3)
    assert (answer["turns"], answer["masked"], answer["cut"]) == (2, True, "turns")


def test_a_masked_answer_is_no_part_of_the_baseline_of_the_others(run_dir):
    file = run_dir / "rollouts" / "if-rl" / "step-000000.jsonl"
    header, first, *others = map(json.loads, file.read_text().splitlines())
    first["masked"] = True
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, first, *others)))
    file.with_suffix(".streams.jsonl").unlink(missing_ok=True)
    answers = stage(rollout_data(read_run(run_dir)), "if-rl")["steps"][0]["groups"][0]["answers"]
    alone = group_advantages([answer["reward"] for answer in answers[1:]], AdvantageConfig())
    assert [answer["advantage"] for answer in answers] == pytest.approx([0.0, *alone], abs=1e-3)
