from pathlib import Path

import pytest

from millrace.config.loading import load_recipe
from millrace.config.rules import check_recipe, recipe_warnings
from millrace.config.schema import RlStage


def check(file: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    return check_recipe(load_recipe(file, overrides), world_size=world_size)


def test_a_sound_recipe_breaks_no_rule(recipe_file: Path) -> None:
    assert check(recipe_file) == []
    assert check(recipe_file, "parallel={tp: 2, pp: 2, dp: 3, sequence_parallel: true}", world_size=12) == []


@pytest.mark.parametrize(
    "parallel",
    [
        "{tp: 2, etp: 2, sequence_parallel: true}",
        "{dp: 2, ep: 2}",
        "{tp: 2, ep: 2, sequence_parallel: true}",
        "{tp: 2, pp: 2, dp: 2, ep: 4, sequence_parallel: true}",
        "{tp: 2, dp: 2, ep: 2, etp: 2, sequence_parallel: true}",
    ],
)
def test_layouts_of_experts_that_megatron_trains_are_accepted(recipe_file: Path, parallel: str) -> None:
    assert check(recipe_file, "model.path=moe", f"parallel={parallel}") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp=4", "parallel.tp is 4, which does not divide the model's 2 key/value heads; use 2"),
        ("parallel.tp=3", "parallel.tp is 3, which does not divide the model's 4 attention heads; use 2 or 4"),
        ("parallel.pp=5", "parallel.pp is 5, but the model has 4 layers; set it to that or less"),
        ("parallel.ep=2", "parallel.ep is 2, but the model has no experts"),
        ("parallel.sequence_parallel=true", "sequence_parallel needs parallel.tp of at least 2"),
        ("parallel.tp=0", "parallel.tp is 0; it must be at least 1"),
        ("parallel.dp=65", "stages.warm.global_batch is 64, fewer than the 65 data-parallel replicas"),
        ("parallel.dp=4000", "stages.climb: an update has 2048 answers, fewer than the 4000"),
        ("fleet.max_model_len=1024", "fleet.max_model_len is 1024, but a micro-batch holds 512 tokens"),
        ("fleet.max_model_len=513", "but the model has 512 positions"),
        ("fleet.max_model_len=64", "stages.climb.sampling.max_response_tokens is 64, which leaves no room"),
        ("stages.warm.max_length=513", "stages.warm.max_length is 513, but a micro-batch holds 512 tokens"),
        ("fleet.engines=0", "there are no engines"),
        ("fleet.addresses=['http://a:1']", "engines and addresses are both given"),
        ("fleet={engines: 0, addresses: ['http://node7:80']}", "works on one host only, but http://node7:80"),
        ("fleet={engines: 0, addresses: ['node7']}", "'node7' is not a URL"),
        ("fleet.interface=0.0.0.0", "listens on every network"),
        ("fleet.extra_args=['--host=0.0.0.0']", "--host is set by Millrace and guards the engines"),
        ("fleet.transport=nccl", "needs CUDA"),
        ("placement.verifier_nodes=2", "placement.verifier_nodes is 2, but no domain has the environment code"),
        ("placement.verifier_nodes=-1", "placement.verifier_nodes is -1; it must be at least 0"),
        ("placement.trainer_nodes=0", "placement.trainer_nodes is 0; it must be at least 1"),
        ("trainer.permute_fusion=true", "trainer.permute_fusion is about experts, but the model has none"),
        ("trainer.permute_fusion=true", "trainer.permute_fusion needs CUDA, but trainer.device is cpu"),
        ("trainer.grouped_gemm=false", "trainer.grouped_gemm is about experts, but the model has none"),
        ("trainer.recompute_modules=[mlp]", "is read with trainer.recompute=selective alone, but that is none"),
        ("trainer.recompute_layers=0", "trainer.recompute_layers is 0; it must be at least 1"),
        ("trainer={recompute: full, recompute_layers: 9}", "but a pipeline stage has at most 4 layers"),
        ("trainer={recompute: selective, recompute_modules: []}", "trainer.recompute_modules is empty"),
        ("trainer={recompute: selective, recompute_modules: [moe]}", "names moe, but the model has no experts"),
        ("trainer={device: cpu, recompute: selective, recompute_modules: [layernorm]}", "through Transformer Engine"),
        ("trainer={grouped_gemm: false, recompute: selective, recompute_modules: [moe_act]}", "needs trainer.grouped"),
        ("trainer={recompute: selective, recompute_modules: [mla_up_proj]}", "the model has no latent attention"),
        ("trainer.token_dispatcher=deepep", "with ep and etp of 1 no token leaves its rank"),
        ("trainer.expandable_segments=true", "trainer.expandable_segments needs CUDA"),
        ("trainer.offload_optimizer=true", "trainer.offload_optimizer needs CUDA"),
        ("trainer.overlap_parameter_gather=true", "set trainer.distributed_optimizer=true"),
        ("trainer.overlap_parameter_gather=true", "set trainer.overlap_gradient_reduction=true"),
        ("stages.warm.epochs=1", "exactly one of steps and epochs, but both are given"),
        ("stages.warm.steps=null", "exactly one of steps and epochs, but neither is given"),
        ("stages.climb.name=warm", "2 stages are named warm"),
        ("stages.climb.name='a/b'", "the name 'a/b' becomes part of file names"),
        ("stages.climb.domains=[code]", "names code, which is not a domain of this recipe (there are: math)"),
        ("stages.climb.domains=[]", "stages.climb.domains is empty"),
        ("stages.climb.samples_per_prompt=1", "compares the answers of a group; use at least 2"),
        ("stages.climb.updates_per_batch=2", "right for on-policy samples only"),
        ("stages.climb.updates_per_batch=500", "more than the 128 groups of a step"),
        ("stages.climb.off_policy.low=3", "low 3.0 must be below high 2.0"),
        ("stages.climb.sampling.temperature=0", "draws the same answer for a whole group"),
        ("stages.climb.kl.coefficient=-1", "stages.climb.kl.coefficient is -1.0; it must be at least 0"),
        ("stages.warm.optimizer.betas=[0.9, 1.0]", "betas is 1.0; it must be at least 0 and below 1"),
        ("stages.warm.optimizer.min_lr=1", "stages.warm.optimizer.min_lr 1.0 is above lr"),
        ("stages.warm.optimizer.warmup_steps=11", "warmup_steps 11 is more than the stage's updates (10)"),
        ("stages=[]", "stages is empty"),
        ("domains.math.grading=fraction", "an answer in math is right or wrong"),
        ("domains.math.held_out=math.jsonl", "train and held_out are the same file"),
        ("domains.math.train=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("model.path=nowhere", "nowhere does not exist; name a Hugging Face checkpoint"),
        ("model.lora.rank=0", "model.lora.rank is 0; it must be at least 1"),
        ("model.lora.dropout=1", "model.lora.dropout is 1.0; it must be at least 0 and below 1"),
        ("model.lora.targets=[]", "model.lora.targets is empty, so that nothing would be trained"),
        (
            "model.lora.targets=[q_proj, gate]",
            "model.lora.targets: the model has no gate; name all-linear, or of q_proj",
        ),
        ("model.lora.adapter=nowhere", "nowhere/adapter_config.json does not exist; name the folder of a PEFT adapter"),
        (
            "model.chat_template=no.jinja",
            "no.jinja does not exist; name a Jinja file, or a built-in one (nemotron)",
        ),
        ("run_dir=recipe.yaml", "recipe.yaml is a file; name a folder"),
    ],
)
def test_a_broken_rule_is_one_sentence_with_the_key(recipe_file: Path, override: str, message: str) -> None:
    found = check(recipe_file, override)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("{tp: 2, etp: 2}", "set parallel.sequence_parallel=true"),
        ("{ep: 3, dp: 3}", "parallel.ep is 3, which does not divide the model's 4 experts; use 2 or 4"),
        ("{ep: 4, dp: 2}", "ep 4 x etp 1 does not divide the 2 ranks"),
        ("{etp: 5, dp: 5}", "parallel.etp is 5, which does not divide the model's 48 columns of an expert"),
    ],
)
def test_layouts_of_experts_that_cannot_work_are_refused(recipe_file: Path, parallel: str, message: str) -> None:
    found = check(recipe_file, "model.path=moe", f"parallel={parallel}")
    assert any(message in problem for problem in found), found


def test_the_world_size_is_compared_when_it_is_known(recipe_file: Path) -> None:
    assert (
        "tp 1 x pp 1 x cp 1 x dp 2 = 2 ranks, but there are 3" in check(recipe_file, "parallel.dp=2", world_size=3)[0]
    )


def test_ranks_may_wait_as_long_for_each_other_as_for_an_engine(recipe_file: Path) -> None:
    too_short = "trainer.collective_timeout_s=60"
    assert check(recipe_file, too_short) == []  # one rank waits for nobody
    assert "wait for engines up to 600 s" in check(recipe_file, too_short, "parallel.dp=2")[0]


def test_sequences_are_shared_over_ranks_but_not_those_of_mamba_layers_on_cpu(recipe_file: Path) -> None:
    from tiny_checkpoints import write_checkpoint

    write_checkpoint("nemotron_h", recipe_file.with_name("hybrid"))
    shared = ("trainer.device=cpu", "parallel.cp=2", "trainer.collective_timeout_s=700")
    assert check(recipe_file, *shared) == []
    assert [p for p in check(recipe_file, *shared, "model.path=hybrid") if "cp" in p] == [
        "parallel.cp is 2 on CPU, but Megatron-Core shares the sequences of Mamba layers through Transformer Engine "
        "only; set parallel.cp=1"
    ]


def test_several_updates_of_one_batch_are_fine_with_a_ratio(recipe_file: Path) -> None:
    for kind in ("ppo", "cispo", "gspo"):
        assert check(recipe_file, "stages.climb.updates_per_batch=2", f"stages.climb.loss.kind={kind}") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it must hold one JSON object a line"),
        ("\n \n", "is empty"),
        ("{'a': 1}", "is not readable as JSON lines"),
        ('\n{"answer": "2"}', "math.jsonl:2 has no field 'prompt'"),
        ("[1]", "has no field 'prompt'"),
    ],
)
def test_a_data_file_that_cannot_be_used_is_found_before_the_run(recipe_file: Path, content: str, message: str) -> None:
    (recipe_file.parent / "math.jsonl").write_text(content)
    found = check(recipe_file)
    assert len(found) == 1 and message in found[0]


def test_a_truncated_checkpoint_is_found_by_its_header(recipe_file: Path) -> None:
    file = recipe_file.parent / "base" / "model.safetensors"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], "is cut short"),
        (whole + b"x", "is longer than it says"),
        (whole[:20], "header cannot be read"),
        (b"", "header cannot be read"),
    ):
        file.write_bytes(content)
        found = check(recipe_file)
        assert len(found) == 1 and message in found[0], found
    file.unlink()
    assert "holds neither model.safetensors nor" in check(recipe_file)[0]


def test_a_missing_shard_and_a_missing_tokenizer_are_named(recipe_file: Path) -> None:
    base = recipe_file.parent / "base"
    (base / "model.safetensors").rename(base / "a.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}')
    (base / "tokenizer.json").unlink()
    found = check(recipe_file)
    assert len(found) == 2
    assert "holds no tokenizer" in found[0] and "b.safetensors is named by" in found[1]


def test_a_tokenizer_without_a_chat_template_needs_one_named(recipe_file: Path) -> None:
    base = recipe_file.parent / "base"
    (base / "tokenizer_config.json").write_text("{}")
    assert "model.chat_template is not set, and the tokenizer in" in check(recipe_file)[0]
    assert check(recipe_file, "model.chat_template=nemotron") == []
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert check(recipe_file) == []


def test_all_rules_are_looked_at(recipe_file: Path) -> None:
    overrides = [
        "parallel.tp=3",
        "fleet.interface=0.0.0.0",
        "stages.warm.steps=0",
        "domains.math.train=x",
        "model.path=y",
    ]
    assert len(check(recipe_file, *overrides)) >= 4


@pytest.mark.parametrize("uri", ["https://me:s3cret@host", "https://s3cret@host", "postgresql://me:s3cret@host/runs"])
def test_no_password_stands_in_the_uri_of_a_tracker(recipe_file: Path, uri: str) -> None:
    found = check(recipe_file, f"observe.mlflow={{tracking_uri: '{uri}', experiment: e}}")
    assert any(
        "tracking_uri holds credentials" in problem and "MLFLOW_TRACKING_PASSWORD" in problem for problem in found
    )
    assert not any("s3cret" in problem for problem in found)


@pytest.mark.parametrize("uri", ["http://host:5000", "sqlite:///mlflow.db", "postgresql://me@host/runs"])
def test_a_uri_without_a_password_is_accepted(recipe_file: Path, uri: str) -> None:
    found = check(recipe_file, f"observe.mlflow={{tracking_uri: '{uri}', experiment: e}}")
    assert not any("credentials" in problem for problem in found)


def test_switches_of_gpus_are_accepted_where_they_are_read(recipe_file: Path) -> None:
    on_gpus = ("model.path=moe", "trainer.device=cuda", "parallel={dp: 2, ep: 2}")
    switches = ("trainer.permute_fusion=true", "trainer.token_dispatcher=deepep", "trainer.expandable_segments=true")
    assert check(recipe_file, *on_gpus, *switches) == []
    (problem,) = check(recipe_file, *on_gpus, *switches, "fleet.transport=ipc")
    assert "trainer.expandable_segments and fleet.transport=ipc exclude each other" in problem


def test_parameters_are_gathered_late_where_the_optimizer_is_distributed(recipe_file: Path) -> None:
    switches = "{device: cuda, distributed_optimizer: true, overlap_gradient_reduction: true"
    late = f"trainer={switches}, overlap_parameter_gather: true}}"
    assert check(recipe_file, late) == []
    (problem,) = check(recipe_file, late, "trainer.distributed_optimizer=false")
    assert "trainer.overlap_parameter_gather needs trainer.distributed_optimizer" in problem


def test_tensor_parallel_ranks_overlap_in_plain_layers_that_fill_their_buffers(recipe_file: Path) -> None:
    on_gpus = ("parallel={tp: 2, dp: 2, sequence_parallel: true}", "model.dtype=bfloat16", "trainer.device=cuda")
    switched = (*on_gpus, "trainer.overlap_tensor_parallel=true")
    assert check(recipe_file, *switched) == []
    for override, message in (
        ("parallel.sequence_parallel=false", "needs a parallel.tp of at least 2 and parallel.sequence_parallel"),
        ("trainer.max_tokens_per_micro_batch=513", "does not divide its 513 tokens; set it to 514"),
        ("parallel.cp=2", "set parallel.cp=1"),
        ("model.dtype=float32", "set that, or leave it out"),
        ("model.lora.rank=4", "model.lora exclude each other"),
        ("precision.fp8=tensorwise", "precision.fp8 exclude each other"),
        ("model.path=moe", "but qwen3_moe has others"),
        ("trainer.device=cpu", "trainer.overlap_tensor_parallel needs CUDA"),
    ):
        found = check(recipe_file, *switched, override)
        assert any(message in problem for problem in found), (override, found)


def test_engines_sleep_where_they_share_the_trainers_gpus_and_nothing_samples_meanwhile(recipe_file: Path) -> None:
    on_gpus = ("trainer.device=cuda", "fleet.transport=ipc", "fleet.sleep=discard")
    assert check(recipe_file, *on_gpus) == []
    (problem,) = check(recipe_file, "trainer.device=cuda", "fleet.transport=nccl", "fleet.sleep=offload")
    assert "fleet.sleep is offload, but with transport nccl engines do not share the trainer's GPUs" in problem


def test_fp8_rollouts_want_bfloat16_beside_them_and_a_correction(recipe_file: Path) -> None:
    (problem,) = check(recipe_file, "fleet.quantization=fp8", "fleet.dtype=float32")
    assert "fleet.quantization is fp8" in problem and "fleet.dtype is float32" in problem
    recipe = load_recipe(recipe_file, ["fleet.quantization=fp8", "fleet.dtype=bfloat16"])
    stages = [stage.name for stage in recipe.stages if isinstance(stage, RlStage)]
    warnings = recipe_warnings(recipe)
    assert len(warnings) == len(stages) > 0
    assert f"set stages.{stages[0]}.off_policy.kind to icepop or tis" in warnings[0]
    corrected = [f"stages.{name}.off_policy.kind=icepop" for name in stages]
    overrides = ["fleet.quantization=fp8", "fleet.dtype=bfloat16", *corrected]
    assert recipe_warnings(load_recipe(recipe_file, overrides)) == []
    assert recipe_warnings(load_recipe(recipe_file, [])) == []
