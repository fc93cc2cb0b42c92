"""`millrace verify`: weights, logits and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from millrace.commands.arguments import FAILED, HfFolder
from millrace.commands.output import plain
from millrace.commands.ranks import Cp, Dp, Ep, Etp, Pp, Tp, on_ranks
from millrace.errors import MillraceError

verify = typer.Typer(no_args_is_help=True, help="Prove that weights, logits and layouts are what they should be.")
Card = Annotated[Path | None, typer.Option(help="Write the result as a small YAML file as well.")]


@verify.command()
def roundtrip(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Hugging Face -> Megatron -> Hugging Face: every tensor must come back bit for bit.

    Example: `millrace verify roundtrip --hf demo/base --tp 2`
    """
    _verify("roundtrip", hf, card, tp, pp, cp, ep, etp, dp)


@verify.command()
def logits(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Logits of the Megatron model against those of transformers, in float32.

    Example: `millrace verify logits --hf runs/laptop-dense/export --tp 2 --card logits.yaml`
    """
    _verify("logits", hf, card, tp, pp, cp, ep, etp, dp)


@verify.command()
def layout(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Loss and gradients of a parallel layout against those of one rank.

    Example: `millrace verify layout --hf demo/base --tp 2 --pp 2`
    """
    _verify("layout", hf, card, tp, pp, cp, ep, etp, dp)


@verify.command()
def sync(
    hf: HfFolder, tp: Tp = 1, pp: Pp = 1, cp: Cp = 1, ep: Ep = 1, etp: Etp = None, dp: Dp = None, card: Card = None
) -> None:
    """Weights swapped into a running engine against a fresh engine, the trainer and transformers.

    Example: `millrace verify sync --hf demo/base --tp 2`
    """
    arguments = ["--hf", str(hf), *(["--card", str(card)] if card else [])]
    on_ranks("cascade.verify_sync", arguments, tp, pp, cp, ep, etp, dp)


@verify.command()
def card(
    hf: HfFolder,
    out: Annotated[Path, typer.Option("--out", help="The card, a YAML file.")] = Path("card.yaml"),
    layout: Annotated[
        list[str] | None, typer.Option(help="Only at this layout, such as 'tp2 pp2'; can be given several times.")
    ] = None,
    sync: Annotated[bool, typer.Option(help="Swap weights into a running engine as well, which needs vLLM.")] = True,
) -> None:
    """Every verification of a checkpoint, at each kind of layout that fits it, recorded on one card.

    Example: `millrace verify card --hf demo/base --out base.yaml`
    """
    from millrace.launch.card import card_command, verify_all, vllm_is_there, write_card

    if sync and not vllm_is_there():
        raise MillraceError("vLLM is not installed, so no engine can take the weights; install it or add --no-sync")
    say = plain().print
    checks = verify_all(hf, sync=sync, only=layout or (), say=say)
    write_card(out, hf, checks, card_command(hf, sync, layout or ()))
    failed = [check for check in checks if not check.passed]
    for check in failed:
        say(f"FAILED: {check.name} at {check.layout}: {check.summary}")
    say(f"{len(checks) - len(failed)} of {len(checks)} checks passed; the card is {out}")
    raise typer.Exit(FAILED if failed else 0)


def _verify(
    what: str, hf: Path, card: Path | None, tp: int, pp: int, cp: int, ep: int, etp: int | None, dp: int | None
) -> None:
    arguments = [what, "--hf", str(hf), *(["--card", str(card)] if card else [])]
    on_ranks("megatron.verify_worker", arguments, tp, pp, cp, ep, etp, dp)
