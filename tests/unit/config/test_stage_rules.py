import shutil
from pathlib import Path

import pytest

from millrace.config.loading import load_recipe
from millrace.config.rules import check_recipe

MOPD = "stages.distil"
SERVED = f"{MOPD}.placement=served {MOPD}.teacher_engine.max_model_len=257"


def check(file: Path, *overrides: str) -> list[str]:
    return check_recipe(load_recipe(file, overrides))


def write_cut_checkpoint(folder: Path) -> None:
    shutil.copytree(folder.parent / "base", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def write_pass_rates(file: Path) -> str:
    (file.parent / "rates.jsonl").write_text('{"id": "a", "pass_rate": 0.5}\n')
    return "domains.math.pass_rates=rates.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.warm.epochs=1", "stages.warm needs exactly one of steps and epochs, but both are given"),
        ("stages.warm.steps=null", "stages.warm needs exactly one of steps and epochs, but neither is given"),
        ("stages.warm.data=[]", "stages.warm.data is empty; name at least one JSONL file of conversations"),
        ("stages.warm.optimizer.min_lr=1", "stages.warm.optimizer.min_lr 1.0 is above lr 3e-06; lower it"),
        ("stages.warm.optimizer.warmup_from=1", "stages.warm.optimizer.warmup_from 1.0 is above lr 3e-06; lower it"),
        ("stages.warm.optimizer.warmup_steps=11", "warmup_steps 11 is more than the stage's updates (10); lower it"),
        ("stages.climb.domains=[]", "stages.climb.domains is empty; name at least one of the recipe's domains"),
        ("stages.climb.domains=[mat]", "names mat, which is not a domain of this recipe (did you mean math?)"),
        ("stages.climb.domains=[math, math]", "names math 2 times; domains are mixed by size, so name it once"),
        (
            "stages.climb.domains=[chat]",
            "names chat, whose answers a judge compares in pairs; make the stage type: rlhf",
        ),
        ("stages.climb.samples_per_prompt=1", "stages.climb.samples_per_prompt is 1, but an advantage compares the"),
        ("stages.climb.one_step_off=true", "stages.climb.one_step_off samples with the weights before the last step"),
        ("stages.climb.off_policy.low=2", "stages.climb.off_policy: low 2.0 must be below high 2.0"),
        ("stages.prefer.domains=[math]", "names math, whose environment math scores each answer alone; train it in a"),
        ("stages.prefer.domains=[chat, math]", "stages.prefer.domains names math, whose environment math scores"),
        ("stages.prefer.samples_per_prompt=1", "stages.prefer.samples_per_prompt is 1, but an advantage compares"),
        ("stages.prefer.bonus_share=0", "stages.prefer.bonus_share is 0.0; it must be above 0 and at most 1"),
        ("stages.prefer.think_bonus=-1", "stages.prefer.think_bonus is -1.0; it must be at least 0"),
        ("stages.prefer.updates_per_batch=0", "stages.prefer.updates_per_batch is 0; it must be at least 1"),
        ("stages.prefer.prompts_per_step=0", "stages.prefer.prompts_per_step is 0; it must be at least 1"),
        ("stages.prefer.sampling.temperature=0", "stages.prefer.sampling.temperature is 0, which draws the same"),
    ],
)
def test_a_broken_rule_of_a_stage_is_one_sentence(cascade_file: Path, override: str, message: str) -> None:
    found = check(cascade_file, override)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{MOPD}.teachers={{}}", f"{MOPD}.teachers is empty, so there is nothing to distil; name the teacher"),
        (
            f"{MOPD}.teachers.maths=stage(warm)",
            "names maths, which is not a domain of this recipe (did you mean math?)",
        ),
        (f"{MOPD}.rewarded=[math]", f"{MOPD}.teachers and rewarded names math 2 times"),
        (f"{MOPD}.ratio_low=2", f"{MOPD}: ratio_low 2 must be below ratio_high 2"),
        (f"{MOPD}.ratio_low=-1", f"{MOPD}.ratio_low is -1.0; it must be at least 0"),
        (f"{MOPD}.advantage_clip=0", f"{MOPD}.advantage_clip is 0.0; it must be above 0"),
        (f"{MOPD}.top_k=0", f"{MOPD}.top_k is 0; it must be at least 1"),
        (f"{MOPD}.dynamic_sampling=true", "drops groups by their rewards, which teachers do not look at; leave it out"),
        (f"{MOPD}.optimizer.warmup_steps=6", f"{MOPD}.optimizer.warmup_steps 6 is more than the stage's updates (5)"),
        (
            f"{SERVED} {MOPD}.signal=top_k",
            "signal is top_k, which needs the teacher's whole distribution",
        ),
        (f"{SERVED} {MOPD}.signal=full", "signal is full, which needs the teacher's whole distribution"),
        (f"{SERVED} {MOPD}.sampling.temperature=0.7", "temperature is 0.7, but a served teacher scores"),
        (
            f"{MOPD}.placement=served {MOPD}.teacher_engine.max_model_len=256",
            "but a teacher scores whole sequences of up to fleet.max_model_len 256 tokens, and vLLM wants room for one "
            "more; set it to at least 257",
        ),
        (
            f"{MOPD}.placement=served {MOPD}.teacher_engine.max_model_len=513",
            f"{MOPD}.teacher_engine.max_model_len is 513, but the model has 512 positions",
        ),
        (f"{SERVED} {MOPD}.teacher_engine.engines=0", f"{MOPD}.teacher_engine.engines is 0, which starts no teacher"),
        (
            f"{SERVED} {MOPD}.teacher_engine.tensor_parallel=3",
            f"{MOPD}.teacher_engine.tensor_parallel is 3, which does not divide the model's 4 attention heads",
        ),
        (
            f"{SERVED} model.dtype=float32",
            f"{MOPD}.teacher_engine.dtype is bfloat16, but model.dtype is float32",
        ),
        (
            f"{MOPD}.mismatch.mask_above=1",
            f"{MOPD}.mismatch.mask_above is 1, which a distillation does not read; its gate is ratio_low and",
        ),
        (
            f"{MOPD}.advantage_clip=2 {MOPD}.signal=full",
            f"{MOPD}.advantage_clip is 2, which bounds the advantage of the sampled token alone, but signal is full",
        ),
        (
            f"{MOPD}.teachers={{}} {MOPD}.rewarded=[math]",
            f"{MOPD}.teachers is empty, so there is nothing to distil; name the teacher of at least one domain",
        ),
        (
            f"{SERVED} {MOPD}.teacher_engine.interface=0.0.0.0",
            f"{MOPD}.teacher_engine.interface is '0.0.0.0', which listens on every network",
        ),
        (
            f"{SERVED} {MOPD}.teacher_engine.addresses=['http://a:1']",
            f"{MOPD}.teacher_engine.addresses are not used, for this server is started by Millrace",
        ),
        (
            f"{MOPD}.samples_per_prompt=1 {MOPD}.prompts_per_step=1 parallel.dp=2",
            "an update has 1 answers, fewer than the 2",
        ),
    ],
)
def test_a_broken_rule_of_distillation_is_one_sentence(cascade_file: Path, override: str, message: str) -> None:
    found = check(cascade_file, *override.split())
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float32 float32", "bfloat16 bfloat16"])
def test_served_teachers_of_at_least_the_models_precision_are_accepted(cascade_file: Path, dtypes: str) -> None:
    model, teacher = dtypes.split()
    settings = f"{SERVED} model.dtype={model} {MOPD}.teacher_engine.dtype={teacher} {MOPD}.advantage_clip=2"
    assert check(cascade_file, *settings.split()) == []


@pytest.mark.parametrize("setting", ["on_failure=back", "certain=true", "against=best"])
def test_a_gate_that_asks_for_nothing_decides_nothing(cascade_file: Path, setting: str) -> None:
    field, value = setting.split("=")
    (problem,) = check(cascade_file, f"stages.prefer.gate.{setting}")
    assert problem == (
        f"stages.prefer.gate.{field} is {value}, but the gate asks for nothing; set min_gain or max_drop, or leave "
        "it out"
    )
    assert check(cascade_file, f"stages.prefer.gate.{setting}", "stages.prefer.gate.max_drop=1") == []


def test_a_rewarded_domain_needs_a_group_and_rewards_of_its_own(cascade_file: Path) -> None:
    only_math = f"{MOPD}.teachers={{math: best(math)}}"
    assert check(cascade_file, only_math, f"{MOPD}.rewarded=[format]") == []
    assert check(cascade_file, only_math, f"{MOPD}.rewarded=[format]", f"{MOPD}.dynamic_sampling=true") == []
    (judged,) = check(cascade_file, only_math, f"{MOPD}.rewarded=[chat]")
    assert judged == f"{MOPD}.rewarded names chat, whose answers a judge compares in pairs; give it a teacher"
    (alone,) = check(cascade_file, only_math, f"{MOPD}.rewarded=[format]", f"{MOPD}.samples_per_prompt=1")
    assert alone.startswith(f"{MOPD}.samples_per_prompt is 1, but an advantage compares")


def test_one_answer_a_prompt_is_enough_for_teachers(cascade_file: Path) -> None:
    assert check(cascade_file, f"{MOPD}.samples_per_prompt=1") == []


@pytest.mark.parametrize("placement", ["time_shared", "resident"])
@pytest.mark.parametrize("signal", ["sampled", "top_k", "full"])
def test_teachers_on_the_trainers_ranks_give_every_signal_at_any_temperature(
    cascade_file: Path, placement: str, signal: str
) -> None:
    settings = (f"{MOPD}.placement={placement}", f"{MOPD}.signal={signal}", f"{MOPD}.sampling.temperature=0.7")
    assert check(cascade_file, *settings) == []


@pytest.mark.parametrize("stage", ["climb", "distil"])
def test_a_curriculum_needs_the_pass_rates_of_its_domains(cascade_file: Path, stage: str) -> None:
    for setting in ("order=easy_to_hard", "above=0", "below=1"):
        found = check(cascade_file, f"stages.{stage}.curriculum.{setting}")
        assert found[0] == (
            f"stages.{stage}.curriculum needs domains.math.pass_rates; measure them with "
            "`millrace data passrate RECIPE --domain math`"
        )
    assert check(cascade_file, f"stages.{stage}.curriculum.order=shuffled") == []


def test_the_bounds_of_a_curriculum_leave_something_between_them(cascade_file: Path) -> None:
    rates = write_pass_rates(cascade_file)
    assert check(cascade_file, rates, "stages.climb.curriculum={order: easy_to_hard, above: 0, below: 1}") == []
    (nothing,) = check(cascade_file, rates, "stages.climb.curriculum={above: 0.5, below: 0.5}")
    assert nothing == "stages.climb.curriculum leaves no prompt: `above` 0.5 must be less than `below` 0.5"
    (outside,) = check(cascade_file, rates, "stages.climb.curriculum.below=2")
    assert outside == "stages.climb.curriculum.below is 2.0; it must be at least 0 and at most 1"


def test_a_judged_domain_has_no_pass_rates_to_order_by(cascade_file: Path) -> None:
    write_pass_rates(cascade_file)
    (problem,) = check(cascade_file, "domains.chat.pass_rates=rates.jsonl", "stages.prefer.curriculum.above=0")
    assert problem.startswith("stages.prefer.curriculum needs pass rates, but a judge compares the answers of chat")


def test_pass_rates_are_looked_at_before_the_run(cascade_file: Path) -> None:
    (missing,) = check(cascade_file, "domains.math.pass_rates=nowhere.jsonl")
    assert missing.startswith("domains.math.pass_rates: the file ") and missing.endswith("does not exist")
    (wrong,) = check(cascade_file, "domains.math.pass_rates=math.jsonl")
    assert wrong.endswith("math.jsonl:1 has no field 'pass_rate'")


@pytest.mark.parametrize(
    "environment", ["mcqa", "structured_outputs", "code", "python_tool", "workplace_assistant", "swe_agentic"]
)
def test_the_other_environments_of_the_paper_are_accepted(cascade_file: Path, environment: str) -> None:
    assert check(cascade_file, f"domains.format.environment={environment}") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("domains.math.grading=fraction", "domains.math.grading is fraction, but an answer in math is right or wrong"),
        ("domains.chat.mask_unless_above=0.5", "domains.chat.mask_unless_above is set, but rewards of genrm only rank"),
        ("domains.math.tables=.", "domains.math.tables is set, but math has no tables; leave it out"),
        ("domains.math.sandbox.cpu_s=2", "domains.math.sandbox is set, but math runs no programs; leave it out"),
        ("domains.math.turns.most=2", "domains.math.turns is set, but an episode in math ends with its first answer"),
        ("domains.math.python.calls=2", "domains.math.python is set, but math has no Python tool; leave it out"),
        (
            "domains.format={environment: python_tool, train: math.jsonl, held_out: held-out.jsonl, "
            "turns: {open_s: 0}}",
            "domains.format.turns.open_s is 0.0; it must be above 0",
        ),
        (
            "domains.format={environment: python_tool, train: math.jsonl, held_out: held-out.jsonl, "
            "turns: {step_s: 600}}",
            "domains.format.turns.step_s is 600, but calls of the Python tool in one turn may take python.all_calls_s "
            "600 s; raise the one or lower the other",
        ),
        (
            "domains.format={environment: code, train: math.jsonl, held_out: held-out.jsonl, sandbox: {cpu_s: 0}}",
            "domains.format.sandbox.cpu_s is 0.0; it must be above 0",
        ),
        (
            "domains.format={environment: swe_agentic, train: math.jsonl, held_out: held-out.jsonl, "
            "swe: {container: bubblewrap}}",
            "domains.format.swe.repositories is required with container bubblewrap: the folder of the rows' "
            "repositories",
        ),
        (
            "domains.format={environment: swe_agentic, train: math.jsonl, held_out: held-out.jsonl, "
            "swe: {images: all.sif}}",
            "domains.format.swe.images is all.sif, the same for every row; put {instance_id} into it",
        ),
        (
            "domains.format={environment: swe_agentic, train: math.jsonl, held_out: held-out.jsonl, "
            "swe: {repositories: here}}",
            "domains.format.swe.repositories is set, but an image of container apptainer holds its own; leave it out",
        ),
        (
            "domains.format={environment: swe_agentic, train: math.jsonl, held_out: held-out.jsonl, "
            "swe: {tests_s: 1800}}",
            "domains.format.turns.step_s is 1200, but a step may take swe.tests_s 1800 s or swe.command_s 120 s; "
            "raise the one or lower the others",
        ),
        (
            "domains.math.swe.at_once=2",
            "domains.math.swe is set, but math has no agent; leave it out",
        ),
        (
            "domains.format={environment: code, train: math.jsonl, held_out: held-out.jsonl, sandbox: {languages: []}}",
            "domains.format.sandbox.languages is []; name at least one, each once",
        ),
        (
            "domains.format={environment: code, train: math.jsonl, held_out: held-out.jsonl, "
            "sandbox: {tests_per_process: 40}}",
            "domains.format.sandbox.tests_per_process is 40; take 1 (each test alone) to 32",
        ),
        (
            "domains.format={environment: code, train: math.jsonl, held_out: held-out.jsonl, sandbox: {memory_mb: 8}}",
            "domains.format.sandbox.memory_mb is 8; an interpreter needs 64, and the most is 4096",
        ),
        (
            "domains.format={environment: code, train: math.jsonl, held_out: held-out.jsonl, "
            "sandbox: {wall_over_cpu: 0.5}}",
            "domains.format.sandbox.wall_over_cpu is 0.5, so that wall time ends before cpu_s; set 1 or more",
        ),
        (
            "domains.math.agent.port=8100",
            "domains.math.agent is set, but no agent's server drives math; leave it out",
        ),
        (
            "domains.format={environment: agent, train: math.jsonl, held_out: held-out.jsonl}",
            "domains.format.agent.url is required: the server of the agent, such as http://node7:8001",
        ),
        (
            "domains.format={environment: agent, train: math.jsonl, held_out: held-out.jsonl, "
            "agent: {url: 'http://me:s3cret@a'}}",
            "domains.format.agent.url holds credentials, which would stand in the run's files; leave them out",
        ),
        (
            "domains.format={environment: agent, train: math.jsonl, held_out: held-out.jsonl, agent: {url: node7}}",
            "domains.format.agent.url is 'node7', which is not a URL such as",
        ),
        (
            "domains.format={environment: agent, train: math.jsonl, held_out: held-out.jsonl, system_prompt: be brief, "
            "agent: {url: 'http://a'}}",
            "domains.format.system_prompt is set, but an agent writes its own prompts; put it into the rows'",
        ),
        (
            "domains.format={environment: agent, train: math.jsonl, held_out: held-out.jsonl, "
            "agent: {url: 'http://a', listen: 0.0.0.0}}",
            "domains.format.agent.listen is '0.0.0.0', which listens on every network of this machine; name the one",
        ),
        (
            "domains.format={environment: agent, train: math.jsonl, held_out: held-out.jsonl, "
            "agent: {url: 'http://a', port: 70000}}",
            "domains.format.agent.port is 70000; it must be",
        ),
        ("domains.chat.judge=null", "domains.chat.judge is required: the entry of `judges` that judges the answers"),
        ("domains.math.judge=genrm", "domains.math.judge is genrm, but math asks no judge; leave it out"),
        ("domains.chat.judge=genrn", "judge is genrn, which is not among the judges (did you mean genrm?)"),
        ("judges={}", "domains.chat.judge is genrm, which is not among the judges (there are: none)"),
        (
            "judges.genrm={model: base, url: 'http://a', max_tokens: 9}",
            "judges.genrm needs exactly one of model and url, but both are given",
        ),
        ("judges.genrm.url=null", "judges.genrm needs exactly one of model and url, but neither is given"),
        ("judges.genrm.url=node7", "judges.genrm.url is 'node7', which is not a URL such as http://node7:8000/v1"),
        (
            "judges.genrm.url='http://node7:x/v1'",
            "judges.genrm.url is 'http://node7:x/v1', which is not a URL: Invalid",
        ),
        ("judges.genrm.url='http://[::1/v1'", "judges.genrm.url is 'http://[::1/v1', which is not a URL: Invalid"),
        ("judges.genrm.url='http://'", "judges.genrm.url is 'http://', which is not a URL such as"),
        ("judges.genrm.max_tokens=0", "judges.genrm.max_tokens is 0; it must be at least 1"),
        ("judges.genrm.retries=-1", "judges.genrm.retries is -1; it must be at least 0"),
        ("judges.genrm={model: nowhere, max_tokens: 99}", "judges.genrm.model: the folder "),
        ("judges.genrm={model: cut, max_tokens: 99}", "judges.genrm.model: "),
        ("judges.genrm={model: base}", "judges.genrm.max_tokens is 16384, which leaves no room for two answers within"),
        (
            "judges.genrm={model: base, max_tokens: 99, engine: {extra_args: ['--middleware=x']}}",
            "judges.genrm.engine.extra_args: --middleware is set by Millrace and guards the engines; leave it out",
        ),
        (
            "judges.genrm={model: base, max_tokens: 99, engine: {interface: '*'}}",
            "judges.genrm.engine.interface is '*', which listens on every network",
        ),
        (
            "judges.genrm={model: base, max_tokens: 99, engine: {addresses: ['http://a:1']}}",
            "judges.genrm.engine.addresses are not used, for this server is started by Millrace; leave them out",
        ),
    ],
)
def test_a_broken_rule_of_a_domain_or_judge_is_one_sentence(cascade_file: Path, override: str, message: str) -> None:
    write_cut_checkpoint(cascade_file.parent / "cut")
    (problem,) = check(cascade_file, override)
    assert message in problem


def test_agents_do_not_listen_at_one_place(cascade_file: Path) -> None:
    agent = "{environment: agent, train: math.jsonl, held_out: held-out.jsonl, agent: {url: 'http://a', port: %d}}"
    one = f"domains.format={agent % 8100}"
    (problem,) = check(cascade_file, one, f"domains.more={agent % 8100}")
    assert problem == "domains.more.agent.port is 8100, as that of domains.format; take another one"
    assert check(cascade_file, one, f"domains.more={agent % 8101}") == []


@pytest.mark.parametrize("user", ["me:s3cret", "s3cret"])
def test_no_password_stands_in_the_url_of_a_judge(cascade_file: Path, user: str) -> None:
    (problem,) = check(cascade_file, f"judges.genrm.url='http://{user}@node7:8000/v1'")
    assert problem.startswith("judges.genrm.url holds credentials") and "s3cret" not in problem
    assert problem.endswith("give them by judges.genrm.api_key_variable")


def test_a_judge_that_the_run_starts_is_accepted(cascade_file: Path) -> None:
    assert check(cascade_file, "judges.genrm={model: base, form: prompt, max_tokens: 64}") == []


def test_an_evaluation_needs_domains(recipe_file: Path) -> None:
    (problem,) = check(recipe_file, "domains={}", "stages=[{type: evaluate, name: look}]")
    assert problem == "stages.look evaluates, but the recipe has no domains; name some with their held-out sets"


def test_what_is_kept_must_be_measured(cascade_file: Path) -> None:
    (problem,) = check(cascade_file, "evaluation.keep=true")
    assert problem.startswith("evaluation.keep keeps what evaluation.every measures, which is 0")
    assert check(cascade_file, "evaluation.keep=true", "evaluation.every=2") == []
