"""What a run left behind: measured, talked to, merged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pennyweight.cli import show
from pennyweight.cli.app import Json, RunFolder, app

__all__ = ["chat", "evaluate", "merge"]


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run's folder; with --tasks also an adapter's, a model's, an id, builtin.",
        ),
    ],
    rows: Annotated[
        int | None, typer.Option(min=1, help="Held-out rows to measure loss on.")
    ] = None,
    answers: Annotated[int | None, typer.Option(min=0, help="Rows to answer in text.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks by lm-eval's names: mmlu,gsm8k,humaneval.")
    ] = None,
    data_dir: Annotated[
        list[Path] | None, typer.Option(help="A folder with the benchmarks' rows; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Render prompts as chat, as training did.")
    ] = False,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run programs the model writes, in limited processes."
        ),
    ] = False,
    model: Annotated[str | None, typer.Option(help="For an adapter's folder: its base.")] = None,
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"] | None,
        typer.Option(help="How a base that no run describes is held; default: none."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where benchmark results go; default: the run's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure base and adapter: held-out rows, or benchmarks.

    Benchmarks need the extra `eval`.
    """
    with show.Printer(as_json) as printer:
        if tasks is None:
            stray = {
                "--data-dir": data_dir,
                "--limit": limit,
                "--num-fewshot": num_fewshot,
                "--chat-template": chat_template,
                "--allow-code-execution": allow_code_execution,
                "--model": model,
                "--quantization": quantization,
                "--out": out,
            }
            show.refuse_stray(stray, needs="--tasks")
            from pennyweight.runs import evaluate_run

            measured = evaluate_run(target, max_rows=rows, generate_rows=answers)
            printer.give(measured, lambda: show.evaluation(measured))
            return
        show.refuse_stray({"--rows": rows, "--answers": answers}, needs="no --tasks")
        from pennyweight.evaluate.tasks import Wanted
        from pennyweight.runs import benchmark

        wanted = Wanted(
            names=tuple(name for name in tasks.split(",") if name),
            data_dirs=tuple(data_dir or ()),
            limit=limit,
            num_fewshot=num_fewshot,
            allow_code_execution=allow_code_execution,
        )
        found = benchmark(
            target, wanted, model=model, quantization=quantization, chat=chat_template, out=out
        )
        printer.give(found, lambda: show.benchmarks(found))


@app.command()
def chat(
    run: RunFolder,
    adapter: Annotated[str, typer.Option(help="default, or none for the bare base.")] = "default",
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Say this and end.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    as_json: Json = False,
) -> None:
    """Talk to a tuned model, or to its base."""
    from pennyweight.runs import open_chat

    with show.Printer(as_json) as printer:
        session = open_chat(
            run,
            None if adapter == "none" else adapter,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        if as_json and message is None:
            message = sys.stdin.read()
        if message is not None:
            reply = "".join(session.send(message))
            printer.give({"adapter": adapter, "message": message, "reply": reply}, lambda: reply)
            return
        show.converse(session)


@app.command()
def merge(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a PEFT adapter.")
    ],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    base: Annotated[
        Literal["auto", "as-trained", "original"],
        typer.Option(
            help="The weights it was trained beside, those of the base's files, or the closer one."
        ),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to compare on.")] = 100,
    data: Annotated[
        Path | None, typer.Option(help="A file of rows in place of the run's held-out ones.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For an adapter: its base, if not the one it names.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="For an adapter: how its base was held in training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fold the adapter into its base, and measure what was lost.

    Writes a plain Hugging Face folder, or refuses and says why.
    """
    from pennyweight.runs import merge_folder

    with show.Printer(as_json) as printer:
        report = merge_folder(
            run,
            out,
            model=model,
            quantization=quantization,
            base=base,
            dtype=dtype,
            data=data,
            rows=rows,
        )
        printer.give(report.to_dict(), lambda: show.merged(report.to_dict()))
