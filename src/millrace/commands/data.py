"""`millrace data`: training data before a stage draws from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from millrace.commands.arguments import FAILED, Overrides, RecipeFile
from millrace.commands.output import plain

data = typer.Typer(no_args_is_help=True, help="Look at training data before a stage draws from them.")
OutFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where train.jsonl and held_out.jsonl are written.")]
DataSeed = Annotated[int, typer.Option(help="What the rows are drawn from.")]
TrainRows = Annotated[int, typer.Option(min=1, help="Rows to train on.")]
HeldOutRows = Annotated[int, typer.Option(min=1, help="Rows to measure on.")]


@data.command()
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="Only this domain of the recipe.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Render only the first N rows of each file; all are checked.")
    ] = None,
) -> None:
    """Show a recipe's data as its run would read them: rows, what is wrong with them, prompt lengths, an example.

    Of each domain, and of the conversations of SFT. Nothing is started. Exit code 1: something is wrong.

    Examples:

    * `millrace data show recipes/laptop/tools.yaml`
    * `millrace data show recipes/laptop/cascade.yaml --domain math --rows 100`
    """
    from millrace.cascade.show_data import show_data
    from millrace.config.loading import load_recipe

    out = plain()
    right = show_data(load_recipe(recipe, overrides or ()), out.print, domain=domain, rows=rows)
    raise typer.Exit(0 if right else FAILED)


@data.command()
def passrate(
    recipe: RecipeFile,
    domain: Annotated[str, typer.Option(metavar="NAME", help="Domain of the recipe.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers a prompt.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write [default: the domain's pass_rates, or a file beside its training prompts]"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="HF_FOLDER", help="Checkpoint to measure [default: the recipe's model]")
    ] = None,
    max_prompts: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N prompts.")] = None,
) -> None:
    """Measure how often a model solves each training prompt of a domain, for a stage's curriculum.

    Answers are sampled as the recipe's evaluation samples them. After a kill, or for more prompts, the same command
    goes on where the file ends.

    Examples:

    * `millrace data passrate recipes/laptop/dense.yaml --domain math`
    * `millrace data passrate recipes/laptop/dense.yaml --domain math --model runs/laptop-dense/export --samples 16`
    """
    from millrace.cascade.passrate import measure_pass_rates, measuring_recipe
    from millrace.config.loading import load_recipe
    from millrace.evaluation.pass_rates import summary

    loaded = load_recipe(recipe, overrides or ())
    measuring = measuring_recipe(loaded, domain, model)
    named = loaded.domains[domain]
    path = out or Path(named.pass_rates or Path(named.train).with_suffix(".pass_rates.jsonl"))
    rows = measure_pass_rates(measuring, path, samples=samples, max_prompts=max_prompts)
    text = f"{summary(rows)}\nwritten to {path}; a stage's curriculum reads it as domains.{domain}.pass_rates"
    plain().print(text)


@data.command()
def tools(
    out: OutFolder,
    seed: DataSeed = 1,
    train: TrainRows = 1000,
    held_out: HeldOutRows = 128,
    most_calls: Annotated[int, typer.Option(min=1, help="Most calls that a task takes.")] = 6,
    offer: Annotated[
        Literal["all", "needed"],
        typer.Option(help="Offer all 27 tools with each task, or the few that it takes: about 4,000 tokens less."),
    ] = "all",
) -> None:
    """Write tasks for the environment workplace_assistant, with the calls that solve them.

    They are about the office that Millrace generates: leave the domain's `tables` out. The same seed writes the same
    rows.

    Example: `millrace data tools data/tools --train 2000 --most-calls 2 --offer needed`
    """
    from millrace.environments.workplace.generate import generated_office
    from millrace.environments.workplace.tasks import distinct_tasks

    tasks = distinct_tasks(generated_office(), seed, train + held_out, most_calls=most_calls)
    _write_rows(out, [task.row(offer) for task in tasks], held_out)


@data.command("long-context")
def long_context(
    out: OutFolder,
    tokenizer: Annotated[Path, typer.Option(metavar="HF_FOLDER", help="Checkpoint whose tokenizer counts.")],
    seed: DataSeed = 1,
    train: TrainRows = 1000,
    held_out: HeldOutRows = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, at most.")] = 32000,
    needed: Annotated[int, typer.Option(min=1, help="Documents that a question takes.")] = 5,
) -> None:
    """Write questions over many documents for the environment long_context.

    Prompts are filled with documents that the question does not need up to the length; the chat template comes on top.
    The same seed writes the same rows.

    Example: `millrace data long-context data/long --tokenizer models/Qwen3-8B --tokens 30000`
    """
    from millrace.data.tokenizer import ChatTokenizer
    from millrace.environments.long_context_tasks import make_rows

    encode = ChatTokenizer(tokenizer).encode
    rows = make_rows(lambda text: len(encode(text)), seed=seed, rows=train + held_out, tokens=tokens, needed=needed)
    _write_rows(out, list(rows), held_out)


def _write_rows(out: Path, rows: list[dict[str, Any]], held_out: int) -> None:
    """Write generated rows to train.jsonl and, the first of them, to held_out.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[held_out:]), ("held_out", rows[:held_out])):
        lines = [json.dumps({"id": f"{name}-{i}", **row}, ensure_ascii=False) for i, row in enumerate(part)]
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        plain().print(f"{out / f'{name}.jsonl'}: {len(lines)} rows")
