"""What a recipe may say.

Every class is frozen and every field's comment-docstring (the string below it) is its documentation: `millrace check
--explain KEY` and the README's tables are read from here. Paths are resolved against the folder of the recipe that
wrote them unless they are absolute. A field whose name ends in an underscore is written without it (`from_`: `from`).
Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

JUDGED = ("genrm", "long_context", "swe_agentless")
"""Environments that ask a judge."""
BUILT_IN_TEMPLATES = ("nemotron",)
"""Chat templates that Millrace ships, by the names that `model.chat_template` takes."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 16
    """Rank r of every adapter: its factors are A [r, inputs] and B [outputs, r]."""
    alpha: float = 32.0
    """Numerator of the scaling: a weight becomes W + alpha / r * B A."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA), which keeps high ranks learning."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers that get an adapter, by the last part of their Hugging Face names, such as q_proj or down_proj;
    all-linear: every one that tensor-parallel ranks cut, those of experts included. Routers, embeddings and the output
    layer get none."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed in training."""
    adapter: str | None = None
    """Folder of a PEFT adapter to start from, with the same rank, alpha and targets; fresh ones when absent."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Folder of the Hugging Face checkpoint to start from (config.json, safetensors, tokenizer)."""
    chat_template: str | None = None
    """`nemotron`, the format of Nemotron-Cascade 2 (without its wording of the tools' instructions), or a Jinja file;
    the export then holds it. When absent the checkpoint's own, and for a nemotron_h that has none `nemotron`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of parameters and activations in the trainer. Optimizer state is float32 in any case."""
    lora: LoraConfig | None = None
    """Train LoRA adapters of the linear layers and leave the model itself as it is. Engines, and the export, get the
    weights with the adapters merged in. null trains all parameters."""


Fp8Recipe = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]
Fp8Format = Literal["e4m3", "hybrid"]


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    fp8: Fp8Recipe = "none"
    """How the linear layers' products are computed in FP8. none: in `model.dtype`, bfloat16 if not said otherwise;
    delayed: one scale a tensor, from the largest values of earlier steps; tensorwise: one scale a tensor, from its own
    largest value; blockwise: a scale for 1 x 128 inputs and gradients and for 128 x 128 weights; mxfp8: a scale for 32
    numbers. Embeddings, norms, attention, routers and the output layer stay in `model.dtype`."""
    format: Fp8Format | None = None
    """e4m3 everywhere, or hybrid: e4m3 for inputs and weights, e5m2 for gradients. When absent hybrid with delayed and
    tensorwise, e4m3 with blockwise and mxfp8."""
    amax_history: int = 1024
    """delayed: over how many steps the largest values are remembered."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """delayed: scale by the largest value remembered, or by the last step's."""
    margin: int = 0
    """delayed: scales leave this many powers of two of room above the largest value."""
    power_of_two_scales: bool = True
    """blockwise: round scales down to powers of two; false keeps them as float32."""
    parameters: bool = False
    """Keep the weights of linear layers in FP8 alone, rather than in bfloat16 with copies in FP8; data-parallel ranks
    then gather half the bytes. The optimizer and its checkpoints go by float32 master weights. Needs
    `trainer.distributed_optimizer`."""
    first_layers_bf16: int = 0
    """Layers at the start of the model that stay in `model.dtype`; not with delayed."""
    last_layers_bf16: int = 0
    """Layers at its end that stay in `model.dtype`; not with delayed."""
    pad_experts: bool = False
    """Let the router fill up each expert's tokens to the multiple that FP8 products need, rather than copying them into
    padded tensors behind it."""
    emulate: bool = False
    """Emulate FP8 on CPU ranks: round the linear layers' inputs, weights and gradients to FP8 with the recipe's scales
    and multiply them in float32. Shows what a recipe does to loss and log-probs; it saves neither time nor memory."""

    @property
    def chosen_format(self) -> Fp8Format:
        return self.format or ("hybrid" if self.fp8 in ("delayed", "tensorwise") else "e4m3")

    @property
    def computes_fp8(self) -> bool:
        """Whether products are computed in FP8, rather than in the model's type or by the emulation."""
        return self.fp8 != "none" and not self.emulate


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp: int = 1
    """Tensor-parallel ranks: each weight matrix is cut over them."""
    pp: int = 1
    """Pipeline-parallel stages: the layers are cut over them, as evenly as their number allows."""
    cp: int = 1
    """Context-parallel ranks: each sequence is cut over them."""
    dp: int = 1
    """Data-parallel replicas of the model. World size = tp * pp * cp * dp."""
    ep: int = 1
    """Expert-parallel ranks of a mixture-of-experts model; taken from the ranks of tp * cp * dp."""
    etp: int = 1
    """Tensor-parallel ranks inside one expert."""
    sequence_parallel: bool = False
    """Cut the activations between tensor-parallel regions along the sequence.
    A mixture of experts with tp > 1 needs it."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float = 3e-6
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine or linear schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    warmup_from: float = 0.0
    """Learning rate at the first step of the warm-up."""
    decay_steps: int | None = None
    """Length of the schedule in steps; the stage's own steps when absent."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's two decay rates."""
    eps: float = 1e-8
    """Adam's denominator term."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); norms and biases are exempt."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


RecomputedModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]
OUTPUT_DISCARDING: tuple[RecomputedModule, ...] = ("moe_act", "layernorm", "mla_up_proj")
"""Those that Megatron-Core computes again through Transformer Engine alone."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs: CUDA with NCCL, or CPU ranks over gloo. `auto` takes CUDA where there is one."""
    max_tokens_per_micro_batch: int = 4096
    """Capacity of one packed micro-batch in tokens, over all its context-parallel ranks; the longest sequence of any
    stage must fit."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: parts of a layer only (selective) or whole layers (full)."""
    recompute_modules: tuple[RecomputedModule, ...] = ("core_attn",)
    """What selective recomputation computes again: core attention (core_attn), a dense feed-forward (mlp), a mixture of
    experts with its router and its all-to-all (moe), its shared experts alone (shared_experts), and through Transformer
    Engine the activation between the two products of the experts (moe_act, with grouped_gemm), the norms before the
    parts of a layer (layernorm), the up projections of latent attention (mla_up_proj). A plan counts what core_attn
    saves, and nothing of the others."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Which layers full recomputation takes: all, in groups of recompute_layers whose input is kept (uniform), or the
    first recompute_layers of each pipeline stage and no other (block)."""
    recompute_layers: int = 1
    """Layers of a group, or of a stage, as recompute_method says."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the moments and the float32 copies of the weights in host memory but for the update itself: room on the GPU
    for engines that share it, and for activations, at the price of two copies a step."""
    overlap_gradient_reduction: bool = False
    """Reduce each bucket of gradients over data-parallel ranks while the backward pass of the last micro-batch still
    computes the others, rather than all behind it."""
    overlap_parameter_gather: bool = False
    """Gather each bucket of parameters, which the distributed optimizer has updated in parts, while the next forward
    pass computes the one before, rather than all at the end of the update; needs distributed_optimizer and
    overlap_gradient_reduction. It saves time where updates follow each other, as in SFT: a weight sync or a checkpoint
    waits for all of them."""
    overlap_tensor_parallel: bool = False
    """Exchange activations between tensor-parallel ranks while the products on either side compute, through buffers of
    Transformer Engine, which have a fixed size: every micro-batch is padded to max_tokens_per_micro_batch, so that it
    pays where micro-batches are nearly full. For dense models in bfloat16 whose tensor-parallel ranks share one node;
    needs sequence_parallel."""
    token_dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """How tokens travel to the experts of other ranks: NCCL's all-to-all, or DeepEP's kernels, which send a token once
    to a node however many of its experts stand there; they need the package deep_ep and ep or etp above 1."""
    grouped_gemm: bool = True
    """Compute the experts of a rank in one grouped product, where Transformer Engine has its kernels; otherwise, and
    with false, one expert after the other."""
    permute_fusion: bool = False
    """Sort the tokens of a mixture of experts by Transformer Engine's fused kernels, which save copies and launches."""
    expandable_segments: bool = False
    """Let the CUDA allocator grow its segments, which keeps packed micro-batches of unequal length from fragmenting the
    GPU's memory."""
    deterministic: bool = False
    """Take only kernels that give the same bits each time, at some cost in speed; CPU ranks do in any case."""
    threads_per_rank: int | None = None
    """CPU threads of one trainer rank on CPU; the cores divided by the ranks when absent."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose vocabulary logits exist at one time in the log-prob head."""
    collective_timeout_s: float = 600.0
    """How long a collective of the trainer may wait before the run is stopped."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the end of each stage is saved in any case. 0: only there."""
    keep: int = 2
    """How many checkpoints stay on disk, the newest first; the end of each stage is kept besides."""


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    engines: int = 1
    """vLLM servers started on this machine. 0 with `addresses`: a fleet that already runs."""
    addresses: tuple[str, ...] = ()
    """Base URLs of servers that already run, as `millrace serve` says them."""
    interface: str = "127.0.0.1"
    """Address the servers listen on."""
    tensor_parallel: int = 1
    """Ranks of one engine."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Data type of the engine; with the trainer's own the log-probs agree best."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the engine's linear layers multiply in FP8 by blocks of 128 x 128, quantised anew from the trainer's weights
    at each sync. Log-probs then differ more from the trainer's: correct for it by an RL stage's `off_policy`, and raise
    `probe_tolerance`. Needs dtype bfloat16, and GPUs of compute capability 8.9 or CPUs with AMX."""
    max_model_len: int = 4096
    """Longest prompt plus answer in tokens."""
    max_num_seqs: int = 64
    """Most sequences an engine decodes at one time."""
    kv_cache_bytes: int = 268435456
    """KV cache of one engine on CPU."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory an engine may take."""
    threads_per_engine: int = 1
    """CPU threads of one engine on CPU."""
    transport: Literal["shared_memory", "disk", "gloo", "nccl", "ipc"] = "shared_memory"
    """How weights reach the engines: shared memory on one host, safetensors on a shared disk, broadcasts by gloo to
    engines on CPU wherever they are, by NCCL to engines on GPUs, or CUDA IPC on the trainer's own GPUs."""
    sleep: Literal["never", "offload", "discard"] = "never"
    """With transport ipc: while the trainer trains, engines give their GPU memory back, and take it again at the sync,
    the KV cache last. offload keeps their weights in host memory, discard does not, since each sync brings all."""
    bucket_bytes: int = 67108864
    """Weights travel in buckets of about this size."""
    start_timeout_s: float = 300.0
    """How long an engine may take to start."""
    request_timeout_s: float = 600.0
    """How long one request may take before its prompt is given to another engine."""
    heartbeat_s: float = 2.0
    """Seconds between health probes; three unanswered in a row and the engine counts as dead."""
    max_restarts: int = 3
    """Restarts of one engine before the run gives up."""
    probe_tolerance: float = 0.05
    """Largest allowed mean |log-prob difference| of the probe prompt between trainer and engine after a sync; float32
    stays below 1e-4, so a recipe in float32 does well to ask for it."""
    extra_args: tuple[str, ...] = ()
    """Further command-line arguments of the vLLM server."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    trainer_nodes: int | None = None
    """Nodes over which the trainer's ranks are spread evenly; as few as hold them when absent."""
    server_nodes: int | None = None
    """Nodes for the vLLM servers of fleet, judges and served teachers, behind the trainer's. 0: beside the trainer's
    ranks on its own nodes. As few as hold them when absent."""
    verifier_nodes: int = 0
    """Nodes that do nothing but test the programs of `code` domains in their sandboxes, as many at one time as a node
    has cores; behind all others. 0: they are tested on rank 0's machine, as in a run on one machine in any case."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    model: str | None = None
    """Folder of a Hugging Face checkpoint that Millrace serves with vLLM as the judge; or `url`."""
    url: str | None = None
    """OpenAI-compatible endpoint of a judge that already runs, such as http://node7:8000/v1; or `model`. It is asked
    directly: proxies that the environment names are not used."""
    served_name: str = "judge"
    """Name of the model at that endpoint."""
    api_key_variable: str | None = None
    """Environment variable that holds the endpoint's API key; none is sent when absent."""
    form: Literal["roles", "prompt"] = "roles"
    """genrm: how two answers are shown: as messages of the roles response_1 and response_2 behind the conversation,
    which NVIDIA's GenRM is trained on, or written out in one user message, which any instruction-following model
    reads."""
    temperature: float = 0.6
    """Sampling temperature of a verdict."""
    top_p: float = 0.95
    """Nucleus sampling threshold of a verdict."""
    max_tokens: int = 16384
    """Longest verdict in tokens, its reasoning included."""
    timeout_s: float = 600.0
    """How long one verdict may take."""
    retries: int = 2
    """Further tries of a verdict that failed or could not be parsed; after the last one genrm
    takes default scores, and the others mask the answer."""
    concurrency: int = 64
    """Most verdicts that are asked for at one time."""
    engine: FleetConfig = field(default_factory=FleetConfig)
    """How the judge's own vLLM server is started, with `model`."""


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    tier: Literal["auto", "zygote", "bubblewrap", "landlock", "unsafe"] = "auto"
    """How programs are kept apart: the first that this machine can make of a zygote in namespaces, one bubblewrap for
    each run, and Landlock; or that one. `unsafe` runs them as the user, with a warning at every start."""
    workers: int | None = None
    """Programs that are tested at one time on rank 0's machine. When absent as many as it has processors, but none in a
    job with `placement.verifier_nodes`, whose nodes test them (code)."""
    cpu_s: float = 4.0
    """Processor time of a test; a row's `time_limit_s` goes before."""
    wall_over_cpu: float = 2.5
    """Wall time of a test as a multiple of its processor time, so that a busy machine decides no verdict."""
    memory_mb: int = 1024
    """Address space of a test in MiB; a row's `memory_limit_mb` goes before."""
    output_kb: int = 1024
    """Output of a test in KiB, of each stream; more ends it."""
    languages: tuple[Literal["python", "cpp"], ...] = ("python",)
    """What programs may be written in, by the tag of their block; an untagged block is of the first. C++ is compiled by
    g++ in the sandbox. A row may ask for one of them by `language`; functions that are called are Python."""
    compile_cpu_s: float = 10.0
    """Processor time of a C++ program's compiler; its wall time is `wall_over_cpu` times it."""
    compile_memory_mb: int = 1024
    """Address space of the compiler in MiB."""
    tests_per_process: int = 1
    """Tests that one process goes through, for programs that are trusted not to keep anything from one test to the
    next; what it does not pass is tested again in a process of its own. Python; a C++ program starts for each test."""


@dataclass(frozen=True, kw_only=True)
class TurnsConfig:
    most: int = 100
    """Turns of the policy in an episode."""
    turn_tokens: int | None = None
    """Longest turn in tokens; one that reaches it ends the episode. `sampling.max_response_tokens` bounds all turns
    together."""
    episode_s: float = 3600.0
    """Wall time of an episode, in which it waits for engines too; looked at while an engine answers and after each step
    of the environment."""
    step_s: float = 1200.0
    """Wall time of one step of the environment. A longer one is the environment's fault, so its episode ends and is
    masked. A tool's own limit, which the policy is told of, must be shorter."""
    open_s: float = 1800.0
    """Wall time until an episode is open, in which it may wait for room; a longer one is masked too."""


@dataclass(frozen=True, kw_only=True)
class PythonToolConfig:
    calls: int = 100
    """Calls of the tool in an episode."""
    call_s: float = 120.0
    """Wall time of a call; after it the interpreter is ended, its state is lost, and the policy is told so."""
    all_calls_s: float = 600.0
    """Wall time of all calls of an episode together; the interpreter's processor time is bounded by the same."""
    output_characters: int = 8000
    """Output that the policy is shown of a call, its beginning and its end."""


@dataclass(frozen=True, kw_only=True)
class SweAgenticConfig:
    container: Literal["apptainer", "bubblewrap"] = "apptainer"
    """What commands and tests run in: an image for each row, or, on a laptop, a box with this machine's own programs
    below /usr."""
    images: str | None = None
    """Path or name of a row's image, with {instance_id} in it; the row's docker_image when absent (apptainer)."""
    repositories: str | None = None
    """Folder with the rows' git repositories, each named as the row's `repo`, / written as __ (bubblewrap)."""
    at_once: int | None = None
    """Episodes that are open at one time; as many as there are processors when absent."""
    command_s: float = 120.0
    """Wall time of a command of the agent."""
    tests_s: float = 900.0
    """Wall time of the tests; `turns.step_s` must be longer."""
    output_characters: int = 16000
    """Output that the policy is shown of a command, its beginning and its end."""
    memory_mb: int = 4096
    """Memory of a command in MiB: of each process, or of the whole container."""
    processes: int = 256
    """Processes and threads of a command."""
    file_mb: int = 1024
    """Largest file of a command in MiB."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    url: str | None = None
    """Where the agent's server is asked, such as http://node7:8001 for a NeMo-Gym agent: each episode is one POST of
    its row to URL/run, whose reply holds the `reward`. It is asked directly: proxies that the environment names are not
    used."""
    listen: str | None = None
    """Address of rank 0 at which the agent finds the policy; where the run's ranks meet when absent: loopback on one
    machine, the address of rank 0's node in a job."""
    port: int = 0
    """Port at that address; a free one of each batch's own when 0. An agent whose own settings name the endpoint, as
    NeMo-Gym's model server does, needs a fixed one."""
    concurrency: int = 256
    """Episodes that the agent's server is given at one time; the others wait, for `turns.open_s` at most."""


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    environment: Literal[
        "math",
        "instruction_following",
        "mcqa",
        "structured_outputs",
        "genrm",
        "code",
        "python_tool",
        "workplace_assistant",
        "long_context",
        "swe_agentless",
        "swe_agentic",
        "agent",
    ]
    """Which environment scores the answers."""
    train: str
    """JSONL file of training prompts."""
    held_out: str
    """JSONL file of held-out prompts; measured, never trained on."""
    grading: Literal["binary", "fraction"] = "binary"
    """instruction_following: 1 only when every constraint holds, or the share that holds. code: the same of tests."""
    system_prompt: str | None = None
    """System message put before each prompt."""
    thinking: bool | None = None
    """Prompts in the chat template's thinking form, or in its non-thinking form; as the template does by itself when
    absent. A row's own `thinking` goes before. Held-out prompts are asked in the same form."""
    judge: str | None = None
    """genrm, long_context, swe_agentless: the entry of `judges` that compares answers with one another, with the right
    one, or with the right repair."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """code, python_tool: where programs are run, in which languages (code), and under which limits."""
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    """Limits of an episode (python_tool, workplace_assistant, swe_agentic, agent: environments with turns)."""
    python: PythonToolConfig = field(default_factory=PythonToolConfig)
    """Limits of the Python tool (python_tool)."""
    tables: str | None = None
    """workplace_assistant: folder of CSV tables that rows refer to, with NeMo-Gym's names and columns; when absent the
    office that Millrace generates, for which `millrace data tools` writes rows."""
    mask_unless_above: float | None = None
    """Leave all answers to a training prompt out of the loss unless one of them has a reward above this: among answers
    that are all bad, the least bad is no example. null trains on every prompt."""
    swe: SweAgenticConfig = field(default_factory=SweAgenticConfig)
    """Containers, repositories and limits of the agent (swe_agentic)."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """The server of an agent that drives the episodes, and where it finds the policy (agent)."""
    pass_rates: str | None = None
    """JSONL file of the training prompts' pass rates, as `millrace data passrate` writes it; a stage's `curriculum`
    reads it."""
    verify_timeout_s: float = 10.0
    """Longest time one verification may take (math, python_tool, mcqa, structured_outputs); then its process is killed
    and it scores 0. Not read by instruction_following, which checks each constraint in time linear in the text, in no
    process of its own, nor by code, whose limits are those of `sandbox`."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    temperature: float = 1.0
    """Sampling temperature; trainer log-probs are taken at the same one."""
    top_p: float = 1.0
    """Nucleus sampling threshold."""
    max_response_tokens: int = 1024
    """Longest answer in tokens; an answer that reaches it is overlong. In an episode of many turns: tokens of all its
    turns together."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """Steps between evaluations inside an RL stage, 0 for none; the start and the end of each stage are measured in any
    case."""
    keep: bool = False
    """Keep a checkpoint at each evaluation inside a stage, so that a teacher rule `best(DOMAIN)` and a gate's way back
    may choose it."""
    samples: int = 1
    """Answers a prompt (avg@k)."""
    max_prompts: int | None = None
    """Only the first so many held-out prompts of each domain."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How held-out answers are sampled."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from each reward: the group's mean, or the mean of the others."""
    scale: Literal["std", "none"] = "std"
    """Divide by the group's standard deviation (GRPO), or not (Dr. GRPO)."""


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    kind: Literal["reinforce", "ppo", "cispo", "gspo"] = "reinforce"
    """Strictly on-policy REINFORCE, PPO's clip (clip-higher with unequal bounds), CISPO, or GSPO."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped."""
    aggregation: Literal["token", "sequence"] = "token"
    """Mean over all tokens of the global batch, or mean over sequences of their token means."""


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig:
    kind: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    """Correction for train/inference mismatch: truncated importance sampling, IcePop's gate, or sequence masks."""
    low: float = 0.5
    """Lowest train/rollout ratio that keeps its weight (icepop, sequence_mask)."""
    high: float = 2.0
    """Highest ratio (icepop, sequence_mask), or where it is truncated (tis)."""


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    coefficient: float = 0.0
    """Weight of the KL term to the stage's starting point; 0 builds no reference model."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator."""


@dataclass(frozen=True, kw_only=True)
class MismatchConfig:
    stop_above: float | None = 0.5
    """Stop the stage when the mean |log p_train - log p_rollout| of a batch exceeds this; null never stops."""
    mask_above: float | None = None
    """Tokens whose |log p_train - log p_rollout| exceeds this get weight 0 (still counted in the denominator)."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    order: Literal["shuffled", "easy_to_hard"] = "shuffled"
    """Draw the prompts in shuffled epochs, or from the highest pass rate to the lowest. The latter, and the two bounds,
    need the domains' `pass_rates`."""
    above: float | None = None
    """Only prompts whose pass rate is above this; 0 drops what is never solved."""
    below: float | None = None
    """Only prompts whose pass rate is below this; 1 drops what is always solved."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    min_gain: float | None = None
    """Least gain on the stage's own domains, in points of the held-out pass rate (percent)."""
    max_drop: float | None = None
    """Largest drop on every other domain, in points."""
    own: tuple[str, ...] | None = None
    """Domains that min_gain speaks about; those of the stage when absent."""
    others: tuple[str, ...] | None = None
    """Domains that max_drop speaks about; all but `own` when absent."""
    against: Literal["parent", "best"] = "parent"
    """What the stage is compared with: the checkpoint it started from, or the best one so far on each domain."""
    certain: bool = False
    """Fail only when the whole 95% interval of the change lies beyond the limit; else its estimate decides."""
    on_failure: Literal["stop", "warn", "back"] = "stop"
    """Stop the run, go on with a warning, or go back: later stages start from the best checkpoint instead."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage has."""

    name: str
    """Name of the stage, unique in the recipe."""
    from_: str | None = None
    """The earlier stage whose result it starts from; the previous one when absent, `start` for the model itself."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What its held-out pass rates must fulfil."""


@dataclass(frozen=True, kw_only=True)
class SftStage(Stage):
    type: Literal["sft"] = "sft"
    data: tuple[str, ...]
    """JSONL files of conversations: {"messages": [{"role", "content"}, ...]}, and perhaps `tools` and `thinking`. The
    assistant's messages are trained on, but for those with `"train": false`."""
    steps: int | None = None
    """Optimizer steps; `epochs` when absent."""
    epochs: float | None = None
    """Passes over the data; exactly one of steps and epochs is given."""
    thinking: bool | None = None
    """false: leave all reasoning out and train the chat template's non-thinking form; true: the thinking form for every
    turn; when absent the form of each turn is told by whether it has reasoning. A row's own `thinking` goes before."""
    global_batch: int = 64
    """Training sequences a step. A conversation is one, unless the chat template rewrites earlier turns (drops their
    reasoning): then each turn is trained on in a sequence that begins as its prompt would."""
    max_length: int = 4096
    """Longest training sequence in tokens; longer ones are an error, or are dropped with `drop_overlong`."""
    drop_overlong: bool = False
    """Leave training sequences longer than max_length out (their number is logged)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class SamplingStage(Stage):
    """What every stage has that trains on the policy's own answers."""

    steps: int
    """Batches of rollouts; each is one policy update, or `updates_per_batch` in an RL stage."""
    prompts_per_step: int = 128
    """Groups a step."""
    samples_per_prompt: int = 16
    """Answers a group."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and sample others until the batch is full."""
    dynamic_sampling_max_rounds: int = 10
    """Rounds of refilling before the stage goes on with a smaller batch."""
    overlong: Literal["keep", "filter", "zero_reward"] = "keep"
    """Answers that reach the length limit: scored as they are, left out of the loss, or given reward 0."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True, kw_only=True)
class RlStage(SamplingStage):
    type: Literal["rl"] = "rl"
    domains: tuple[str, ...]
    """Domains whose training prompts are mixed evenly by size."""
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    updates_per_batch: int = 1
    """Optimizer steps on one batch of rollouts; 1 is strictly on-policy."""
    one_step_off: bool = False
    """Sample the next step's answers while this one is trained, so that neither fleet nor trainer waits for the other.
    They come from the weights before the last step, which off_policy corrects; `mismatch` then holds that step too."""


@dataclass(frozen=True, kw_only=True)
class RlhfStage(RlStage):
    type: Literal["rlhf"] = "rlhf"  # type: ignore[assignment]
    kl: KlConfig = field(default_factory=lambda: KlConfig(coefficient=0.03))
    pairing: Literal["all_pairs", "circular"] = "all_pairs"
    """Which answers of a group are compared: each with every other, or each with the next one around a circle."""
    both_orders: bool = True
    """Judge each pair in both orders, so that a judge that likes the first answer better favours none."""
    think_length_weight: float = 0.5
    """Weight of the length-controlled reward of the reasoning: the shortest of the group gains most; 0 switches off."""
    answer_length_weight: float = 0.5
    """The same for the answer behind the reasoning."""
    think_bonus: float = 0.5
    """Bonus of the answer with the shortest reasoning, if its quality is among the best `bonus_share` of the group."""
    answer_bonus: float = 0.5
    """Bonus of the shortest answer, under the same condition."""
    bonus_share: float = 0.2
    """The best so-large share of a group, by reward of the comparisons alone, may get a bonus."""


@dataclass(frozen=True, kw_only=True)
class MopdStage(SamplingStage):
    type: Literal["mopd"] = "mopd"
    teachers: dict[str, str]
    """The teacher of each domain: `best(DOMAIN)`, the checkpoint so far with the highest held-out pass rate there, or
    `stage(NAME)`, the result of that stage (`stage(start)`: the model itself)."""
    rewarded: tuple[str, ...] = ()
    """Further domains, which are trained by their rewards in the same batch, as in an RL stage."""
    samples_per_prompt: int = 4
    """Answers a prompt."""
    placement: Literal["time_shared", "resident", "served"] = "time_shared"
    """Where teachers live: swapped into the trainer's ranks from host memory, as models of their own beside the policy,
    or as vLLM servers."""
    signal: Literal["sampled", "top_k", "full"] = "sampled"
    """What a teacher says of each token: its log-prob alone (the paper), or the reverse KL over the `top_k` likeliest
    tokens, or over the whole vocabulary."""
    top_k: int = 64
    """Tokens of the top_k signal."""
    support: Literal["student", "teacher"] = "student"
    """Whose likeliest tokens the top_k signal compares."""
    ratio_low: float = 0.5
    """Tokens whose train/rollout probability ratio is below this get weight 0 (still counted in the denominator)."""
    ratio_high: float = 2.0
    """The same for ratios above this."""
    advantage_clip: float | None = None
    """Bound of |log pi_teacher - log pi_train|; none when absent, as in the paper."""
    aggregation: Literal["token", "sequence"] = "sequence"
    """Mean over sequences of their token means, as the paper's equation 4, or mean over all tokens of the batch."""
    teacher_engine: FleetConfig = field(default_factory=FleetConfig)
    """How the vLLM servers of `placement: served` are started, one for each distinct teacher."""

    @property
    def domains(self) -> tuple[str, ...]:
        return (*self.teachers, *self.rewarded)


@dataclass(frozen=True, kw_only=True)
class EvaluateStage(Stage):
    type: Literal["evaluate"] = "evaluate"


StageConfig = SftStage | RlStage | RlhfStage | MopdStage | EvaluateStage


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    project: str
    """Project of the run."""
    entity: str | None = None
    """Team or user; the login's own when absent."""
    mode: Literal["online", "offline"] = "online"
    """Send the metrics while the run goes, or keep them in RUN_DIR/wandb for `wandb sync`."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    tracking_uri: str
    """Where MLflow keeps runs, such as http://host:5000 or sqlite:///mlflow.db."""
    experiment: str
    """Name of the experiment."""


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    tensorboard: bool = True
    """Write TensorBoard event files to RUN_DIR/tensorboard."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases (extra `wandb`)."""
    mlflow: MlflowConfig | None = None
    """Also log to MLflow (extra `mlflow`)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    """Name of the run."""
    run_dir: str
    """Folder of the run: recipe, ledger, checkpoints, metrics, rollouts, export. Against the current folder."""
    seed: int = 1
    """Seed of everything that is drawn at random."""
    model: ModelConfig
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """FP8 in the trainer; without this section everything is computed in `model.dtype`."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which nodes of a cluster do what; on one machine nothing reads it."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """The domains by name."""
    judges: dict[str, JudgeConfig] = field(default_factory=dict)
    """Judges by name; the domains that are judged name theirs."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    stages: tuple[StageConfig, ...]
    """What is done, in order. Each stage starts from the one before it unless its `from` names another."""
    export: bool = True
    """Write the final policy as a Hugging Face checkpoint to RUN_DIR/export."""

    @property
    def samples(self) -> bool:
        """Whether the run draws answers and so needs engines: in an RL stage, or to measure its domains."""
        return bool(self.domains) or any(isinstance(stage, SamplingStage) for stage in self.stages)

    @property
    def runs_code(self) -> bool:
        """Whether a domain has programs that a node which verifies can test."""
        return any(domain.environment == "code" for domain in self.domains.values())

    @property
    def judges_used(self) -> dict[str, JudgeConfig]:
        """The judges that a judged domain names: those that run as long as the run does."""
        named = {domain.judge for domain in self.domains.values() if domain.environment in JUDGED}
        return {name: judge for name, judge in self.judges.items() if name in named}
