"""A small recipe with a side branch, and rows and events of a run through it, for the tests of the cascade."""

from millrace.cascade.history import History, Row
from millrace.config.schema import (
    DomainConfig,
    GateConfig,
    ModelConfig,
    MopdStage,
    Recipe,
    RlStage,
    SftStage,
)
from millrace.evaluation.pass_rate import PassRate

DOMAINS = ("math", "if", "chat")


def recipe(**gates: GateConfig) -> Recipe:
    """sft -> rl-if -> rl-math, chat from sft, mopd from rl-math; `gates` by stage (rl_if for rl-if)."""

    def gate(name: str) -> GateConfig:
        return gates.get(name.replace("-", "_"), GateConfig())

    return Recipe(
        name="small",
        run_dir="runs/small",
        model=ModelConfig(path="base"),
        domains={name: DomainConfig(environment="math", train="t", held_out="h") for name in DOMAINS},
        stages=(
            SftStage(name="sft", data=("d",), steps=4, gate=gate("sft")),
            RlStage(name="rl-if", domains=("if",), steps=4, gate=gate("rl-if")),
            RlStage(name="rl-math", domains=("math",), steps=4, gate=gate("rl-math")),
            RlStage(name="chat", from_="sft", domains=("chat",), steps=4, gate=gate("chat")),
            MopdStage(
                name="mopd",
                from_="rl-math",
                steps=4,
                teachers={"math": "best(math)", "if": "stage(rl-if)", "chat": "best(chat)"},
                gate=gate("mopd"),
            ),
        ),
    )


def row(label: str, *rates: float, checkpoint: bool = True, half_width: float = 0.05) -> Row:
    """A row with the pass rates of DOMAINS in their order."""
    scores = {name: PassRate(rate, half_width, 100, 200) for name, rate in zip(DOMAINS, rates, strict=False)}
    return Row(label, scores, f"checkpoint-{label}" if checkpoint else None)


def history(*rows: Row, **results: str) -> History:
    """Rows, and results of stages whose gates went back (rl_if for rl-if)."""
    gates = {stage.replace("_", "-"): {"result": label} for stage, label in results.items()}
    return History(rows={one.label: one for one in rows}, gates=gates)
