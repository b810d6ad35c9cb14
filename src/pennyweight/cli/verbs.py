"""The verbs. Each parses its arguments, calls one function, and hands the answer to the printer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pennyweight.cli import show
from pennyweight.cli.ending import not_begun

__all__ = ["app"]

app = typer.Typer(
    name="pennyweight",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run's description.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder a run wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def _version(asked: bool) -> bool:
    if asked:
        from pennyweight import __version__

        print(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Fine-tune large language models with LoRA and QLoRA on modest machines."""


@app.command()
def init(
    model: Annotated[
        str, typer.Option(help="A Hugging Face id, a folder, or builtin.")
    ] = "builtin",
    data: Annotated[
        str, typer.Option(help="A file, a folder, a dataset id, or builtin.")
    ] = "builtin",
    method: Annotated[
        Literal["qlora", "lora", "full"], typer.Option(help="What is trained, on what base.")
    ] = "qlora",
    output_dir: Annotated[str, typer.Option(help="Where the run writes.")] = "runs/my",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Four adapters to begin with: two ranks, two rates.")
    ] = False,
    schema: Annotated[
        Path | None, typer.Option(help="Write the JSON Schema there, and name it for editors.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print a commented run.yaml with the settings that matter."""
    from pennyweight.config import starter, write_schema

    with show.Printer(as_json) as printer:
        text = starter(model=model, data=data, method=method, output_dir=output_dir, sweep=sweep)
        if schema is not None:
            write_schema(schema)
            text = f"# yaml-language-server: $schema={schema.as_posix()}\n{text}"
        printer.give({"yaml": text}, lambda: text.rstrip("\n"))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other tool's file.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the run's YAML goes; stdout without it.")
    ] = None,
    tool: Annotated[
        Literal["axolotl", "llama-factory", "trl", "peft"] | None,
        typer.Option("--from", help="Whose file it is; told by its keys without it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Translate another tool's configuration, with an account of every key.

    It reads axolotl's YAML, LLaMA-Factory's YAML, a configuration of TRL's sft, and PEFT's
    adapter_config.json.
    """
    from pennyweight.config.foreign import import_run, write_run

    with show.Printer(as_json) as printer:
        found = import_run(file, tool, beside=out.parent if out else None)
        if out is not None:
            write_run(found, out)
        answer = {**found.to_dict(), "out": str(out) if out else None}
        if not as_json:
            printer.aside(show.imported(found, file.name, out))
        printer.give(answer, lambda: "" if out else found.text.rstrip("\n"))


@app.command()
def preview(
    run: RunFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    row: Annotated[
        list[str] | None,
        typer.Option(help="A row to show, as file:line or line; again for more."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the ledger of all rows and its picture.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model reads them, trained tokens in green.

    What was cut or dropped is counted below them. Ends as train would where it refuses the data.
    """
    from pennyweight.config import load_run

    with show.Printer(as_json) as printer:
        config = load_run(run, overrides or ()).config
        from pennyweight.errors import DataError
        from pennyweight.finetune import look

        seen = look(config, rows, named=row or (), out=out)
        printer.give(seen.to_dict(), lambda: show.preview(seen.shown, seen.lines))
        if seen.refusal:
            raise DataError.all(seen.refusal)


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    device: Annotated[
        str | None, typer.Option(help="A device by name: rtx4090, h200, cpu.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to plan for, such as 24GB.")] = None,
    fit: Annotated[
        str | None, typer.Option(help="Find the largest run that fits, such as 24GB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict memory, time and disk before anything is loaded."""
    from pennyweight.calibrate import calibrated
    from pennyweight.config import load_run
    from pennyweight.plan import fit as find_fit
    from pennyweight.plan import named_device, parse_memory
    from pennyweight.plan import plan as predict

    with show.Printer(as_json) as printer:
        config = load_run(run, overrides or ()).config
        on = calibrated(named_device(device or config.base.device), config)
        if fit:
            found = find_fit(config, device=on, budget_bytes=parse_memory(fit))
            printer.give(show.plain_fields(found), lambda: show.facts(show.plain_fields(found)))
            return
        budget = parse_memory(memory) if memory else None
        if config.adapters.list or config.adapters.grid:
            from pennyweight.config import variants
            from pennyweight.sweep import sizes

            shared = config.adapters.mode == "fast"
            many = sizes(variants(config), shared=shared, device=on, budget_bytes=budget)
            printer.give(many.to_dict(), lambda: show.plan(many))
            return
        said = predict(config, device=on, budget_bytes=budget)
        printer.give(said.to_dict(), lambda: show.plan(said))


@app.command()
def parity(
    target: Annotated[
        Path, typer.Argument(metavar="RUN.YAML|RUN", help="A description, or a run's folder.")
    ],
    overrides: Overrides = None,
    merged: Annotated[
        Path | None, typer.Option(help="A merged folder; default the run's own, if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that training, chat, server and merged folder read a conversation as the same ids.

    Reads no weight. Every `train` begins with it.
    """
    with show.Printer(as_json) as printer:
        from pennyweight.finetune import parity as compare

        found = compare(target, overrides or (), merged=merged)
        printer.give(found.to_dict(), lambda: show.parity(found))
    raise typer.Exit(found.exit_code)


@app.command()
def train(run: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train; the same command again resumes.

    With `adapters:` in the file all it describes are trained, side by side over one base.
    """
    from pennyweight.config import load_run

    with show.Printer(as_json) as printer, not_begun():
        loaded = load_run(run, overrides or ())
        # After the description was found sound: what follows takes seconds to import.
        adapters = loaded.config.adapters
        if adapters.list or adapters.grid:
            from pennyweight.sweep import sweep

            found = sweep(loaded.config, origin=loaded.origin, text=loaded.text)
            printer.give(found.to_dict(), lambda: show.adapters(found))
            if found.exit_code:
                raise typer.Exit(found.exit_code)
            return
        from pennyweight.finetune import finetune

        result = finetune(loaded.config, origin=loaded.origin, text=loaded.text)
        printer.give(result.to_dict(), lambda: show.facts(result.to_dict()))


@app.command()
def compare(
    run: RunFile,
    overrides: Overrides = None,
    arms: Annotated[str | None, typer.Option(help="Methods to compare: full,lora,qlora.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks to compare: 4,8,16,32,64.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, a run each: 0,1,2.")] = None,
    as_json: Json = False,
) -> None:
    """Train base, LoRA, QLoRA and full side by side: same rows, same tokens.

    One table with intervals; the same command again resumes.
    """
    from pennyweight.config import load_run

    with show.Printer(as_json) as printer:
        lists = {"compare.arms": arms, "compare.ranks": ranks, "compare.seeds": seeds}
        given = [f"{key}=[{value}]" for key, value in lists.items() if value is not None]
        loaded = load_run(run, [*(overrides or ()), *given])
        from pennyweight.compare import compare as side_by_side

        found = side_by_side(loaded.config, origin=loaded.origin)
        printer.give(found.to_dict(), lambda: show.comparison(found))


@app.command("compare-part", hidden=True)
def compare_part(
    name: Annotated[str, typer.Argument(help="Which part; its job is JSON on stdin.")],
    as_json: Json = False,
) -> None:
    """One part of a comparison, in a process of its own."""
    import json

    from pennyweight.compare import run_part

    with show.Printer(as_json) as printer:
        answer = run_part(name, json.load(sys.stdin))
        printer.give(answer, lambda: show.facts(answer))


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


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="A YAML file with a server's settings.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A Hugging Face id, a folder, or builtin (the default).")
    ] = None,
    quantization: Annotated[
        Literal["none", "int8", "nf4", "fp4"] | None,
        typer.Option(help="How the base is held; default nf4."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="A folder of adapters, each served by its folder's name.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at; 8000.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where jobs and adapters are kept; runs/serve.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="A file of keys, `NAME KEY` a line.")] = None,
) -> None:
    """Serve a base and its adapters over OpenAI's API, and train more beside them.

    Files, fine-tuning jobs, models, chat, usage. Needs the extra `serve`. The key is printed.
    """
    from pennyweight.serve import load_settings
    from pennyweight.serve import serve as run_server

    given = {
        "base.model": base,
        "base.quantization": quantization,
        "adapters": None if adapters is None else str(adapters),
        "host": host,
        "port": port,
        "data_dir": None if data_dir is None else str(data_dir),
        "keys": None if keys is None else str(keys),
    }
    with not_begun():
        run_server(load_settings(config, {k: v for k, v in given.items() if v is not None}))


@app.command()
def quickstart(
    output_dir: Annotated[str, typer.Option(help="Where the run writes.")] = "runs/quickstart",
    as_json: Json = False,
) -> None:
    """Tell the whole story on the built-in model and task.

    It takes a few minutes on a CPU and needs no download.
    """
    from pennyweight.quickstart import quickstart as tell

    with show.Printer(as_json) as printer:
        figures = tell(output_dir, print)
        printer.give(figures, lambda: show.facts(figures))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look over this machine, one fix a line."""
    from pennyweight.doctor import doctor as look_over

    with show.Printer(as_json) as printer:
        found = look_over()
        answer: dict[str, Any] = {"ok": all(each.ok for each in found), "checks": found}
        printer.give(answer, lambda: show.checks(found))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="Such as train.learning_rate.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a setting does, takes, defaults to and needs."""
    from pennyweight.config import explain as say

    with show.Printer(as_json) as printer:
        text = say(key)
        printer.give({"key": key, "text": text}, lambda: text)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of run.yaml, for editors."""
    import json

    from pennyweight.config import json_schema

    with show.Printer(as_json) as printer:
        printer.give(json_schema(), lambda: json.dumps(json_schema(), indent=2))
