"""The command line: thin commands over the library."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from selftaught.errors import Unreachable, UserError
from selftaught.studies import STUDIES, start

app = typer.Typer(help="Train language models on their own rollouts.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False, rich_markup_mode=None)
Recipe = Annotated[str, typer.Argument(
    help="a YAML file, a run's folder, or a shipped recipe: quickstart, small/METHOD, papers/NAME, science/NAME")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example optim.steps=10")]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"selftaught {version('selftaught')}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", help="print the version", is_eager=True,
                                                  callback=_print_version)] = False) -> None:
    """Train language models on their own rollouts."""


@app.command()
def train(recipe: Recipe, overrides: Overrides = None,
          dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved run and the forecast")] = False,
          resume: Annotated[bool, typer.Option("--resume", help="go on from the newest whole checkpoint")] = False
          ) -> None:
    """Train by a recipe."""
    from selftaught.run import load_run

    run = load_run(recipe, overrides or [])
    if dry_run:
        _dry_run(run, resume)
        return
    from selftaught.train import train as start

    try:
        finished = start(run, resume=resume, console=Console())
    except KeyboardInterrupt:
        typer.echo("stopped at once; go on with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    if finished.interrupted is not None:
        raise typer.Exit(128 + finished.interrupted)


@app.command("eval")
def evaluate(model: Annotated[str | None, typer.Argument(help="a run's folder, a model's folder or a Hub name")] = None,
             recipe: Annotated[str | None, typer.Argument(help="the recipe that says on what")] = None,
             overrides: Overrides = None,
             resume: Annotated[bool, typer.Option("--resume", help="go on with one that was killed")] = False,
             completions: Annotated[Path | None, typer.Option(help="measure this completions.jsonl alone")] = None,
             reward: Annotated[str | None, typer.Option(
                 help="score --completions again: a verifier as in a recipe; or a recipe, its reward and data")] = None,
             out: Annotated[Path | None, typer.Option(help="where what --reward scores again is written")] = None,
             compare: Annotated[tuple[Path, Path] | None, typer.Option(
                 help="two completions.jsonl or folders: differences on the same problems, second minus first")] = None,
             k: Annotated[str, typer.Option(help="the k of pass@k, with commas")] = "",
             json_out: Annotated[Path | None, typer.Option("--json", help="write the measures here")] = None,
             leakage: Annotated[bool, typer.Option("--leakage", help="of a saved run: what its student took over that "
                                                   "only its teacher could know")] = False,
             diversity: Annotated[bool, typer.Option("--diversity", help="of a saved run or file: how different the "
                                                     "answers are")] = False,
             embedder: Annotated[str, typer.Option(help="of --diversity: ngrams, sentences, or a model folder")] = ""
             ) -> None:
    """Sample, verify and measure; or measure what is saved, score it again, or compare two."""
    ks = _ladder(k) if k else None
    if leakage or diversity or embedder:
        if resume or reward or out or compare:
            raise UserError("eval: --leakage and --diversity measure what is saved, so leave --resume, --reward, --out "
                            "and --compare out")
        from selftaught.learned import learned, lines

        found = learned(model, [*([recipe] if recipe else []), *(overrides or [])], completions, ks=ks, leakage=leakage,
                        diversity=diversity or bool(embedder), embedder=embedder or "ngrams", say=_say, warn=_warn)
        for line in lines(found):
            typer.echo(line)
        if json_out is not None:
            _write(json_out, json.dumps(found, indent=2) + "\n")
        return
    _refuse_mixed_eval(model, resume, completions, reward, out, compare)
    if completions is not None or compare is not None:
        from selftaught.saved import compare_files, measure_file, score_again

        if completions is not None and reward is not None:
            completions = score_again(completions, reward, out, _warn, _say)
            _say(f"completions: {completions}")
        found = compare_files(*compare, ks, _warn) if compare else measure_file(completions or Path(), ks, _warn)
    else:
        from selftaught.evaluate import evaluate_model

        if recipe is not None and "=" in recipe:  # `eval RUN key=value`: by the run's own recipe
            overrides = [recipe, *(overrides or [])]
            recipe = None
        ladder = [] if ks is None else [f"eval.k={list(ks)}", f"eval.best=pass@{ks[0]}"]
        try:
            found = evaluate_model(str(model), recipe, [*(overrides or []), *ladder], _say, resume=resume)
        except KeyboardInterrupt:
            typer.echo("stopped; what was sampled stays, and the same command goes on with --resume", err=True)
            raise typer.Exit(130) from None
    Console().print(_differences(found) if compare else _measures(found))
    if json_out is not None:
        _write(json_out, json.dumps(found, indent=2) + "\n")


def _refuse_mixed_eval(model: str | None, resume: bool, completions: Path | None, reward: str | None, out: Path | None,
                       compare: tuple[Path, Path] | None) -> None:
    """Raise UserError for options of `eval` that say nothing together."""
    given = [f"the model {model!r}"] * (model is not None) + ["--completions"] * (completions is not None)
    given += ["--compare"] * (compare is not None)
    if not given:
        raise UserError("eval: give a run's folder (`selftaught eval runs/quickstart`), a model and a recipe "
                        "(`selftaught eval MODEL quickstart`), --completions FILE, or --compare A B")
    if len(given) > 1:
        raise UserError(f"eval: {given[1]} works on saved files alone, so leave {given[0]} out")
    if reward is not None and completions is None:
        raise UserError("eval: --reward scores a saved file again: name it with --completions; what samples is "
                        "scored by the recipe's reward, or reward=NAME")
    if out is not None and reward is None:
        raise UserError("eval: --out names what --reward scores again; an evaluation's folder is set by out=FOLDER")
    if resume and model is None:
        raise UserError("eval: --resume goes on with sampling, so it needs the model and what was said with it")


@app.command()
def doctor(recipe: Recipe, overrides: Overrides = None,
           resume: Annotated[bool, typer.Option("--resume", help="look before going on with a run")] = False) -> None:
    """Look at a recipe before the long run; each line says ok or what to change."""
    from selftaught.assemble import lay_ground
    from selftaught.doctor import examine
    from selftaught.run import load_run

    ground = lay_ground(load_run(recipe, overrides or []), _say)
    try:
        lines = examine(ground, _say, resume=resume)
    finally:
        if ground.rewarder is not None:
            ground.rewarder.close()
    for line in lines:
        typer.echo(f"{'ok    ' if line.ok else 'CHANGE'}  {line.text}")
    raise typer.Exit(0 if all(line.ok for line in lines) else 1)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="a method: equations, fields, source, criticism")] = None,
            markdown: Annotated[bool, typer.Option("--markdown", help="all of it, as a page of documentation")] = False
            ) -> None:
    """The methods: who teaches, by what, with which data; or all about one of them."""
    from selftaught.methods import names
    from selftaught.methods.describe import COLUMNS, as_markdown, as_text, describe

    if markdown:
        if name is not None:
            raise UserError(f"methods: --markdown writes the page of all methods, so leave {name!r} out")
        typer.echo(as_markdown(), nl=False)
    elif name is not None:
        typer.echo(as_text(describe(name)))
    else:
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for each in names():
            table.add_row(*describe(each).row())
        Console().print(table)
        typer.echo("\nselftaught methods NAME: equations, fields, source, and what is held against it")


@app.command("recipe")
def recipe_fields(
    section: Annotated[str | None, typer.Argument(help="a section of it, such as optim or privilege")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="all of it, as a page of documentation")] = False,
) -> None:
    """Every field of a recipe: what may stand there, its default, and what it is."""
    from selftaught.schema import as_markdown, as_text

    if markdown and section is not None:
        raise UserError(f"recipe: --markdown writes the page of all fields, so leave {section!r} out")
    typer.echo(as_markdown(), nl=False) if markdown else typer.echo(as_text(section))


@app.command()
def hints(data: Annotated[str, typer.Argument(help="a file, a folder saved by `datasets`, or a Hub name")],
          out: Annotated[Path, typer.Option(help="JSON lines to write, or to go on with")],
          endpoint: Annotated[str, typer.Option(help="an OpenAI-compatible URL, for example http://localhost:8000/v1")],
          model: Annotated[str, typer.Option(help="the model that writes")],
          judge: Annotated[str | None, typer.Option(help="the model that checks; by default the same")] = None,
          check: Annotated[bool, typer.Option(help="let a second pass drop weak hints")] = True,
          key: Annotated[str, typer.Option(help="the environment variable that holds the key")] = "OPENAI_API_KEY",
          prompt: Annotated[str | None, typer.Option(help="the column of the problem")] = None,
          solution: Annotated[str | None, typer.Option(help="the column of the verified rationale")] = None,
          answer: Annotated[str | None, typer.Option(help="the column of the final answer")] = None,
          column: Annotated[str, typer.Option(help="the column to write")] = "hint",
          split: Annotated[str, typer.Option(help="which split of a Hub name or a saved folder")] = "train",
          limit: Annotated[int | None, typer.Option(min=1, help="at most so many problems now")] = None,
          concurrency: Annotated[int, typer.Option(min=1, help="requests at a time")] = 8,
          retries: Annotated[int, typer.Option(min=0, help="how often a request is sent again")] = 5,
          timeout: Annotated[float, typer.Option(min=0.1, help="seconds to wait for an answer")] = 120.0) -> None:
    """Let a model write a hint for each problem, and drop weak ones: the privilege of DOPD.

    Then train on what it wrote, with `data: hints.jsonl` (what --out names) and `privilege: hint`.
    """
    from selftaught.chat import Chat
    from selftaught.hints import write_hints

    names = {"prompt": prompt, "solution": solution, "answer": answer}
    try:
        counts = write_hints(
            data, out, Chat(endpoint, key, timeout, retries), model, judge=judge, check=check, column=column,
            columns={ours: name for ours, name in names.items() if name}, split=split, limit=limit,
            concurrency=concurrency, say=_say)
    except KeyboardInterrupt:
        typer.echo("stopped; what was written stays, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    for line in counts.lines():
        typer.echo(line)


@app.command()
def continual(
    models: Annotated[list[str], typer.Argument(
        help="runs, model folders or Hub names: one after each task, before them the untrained one; then key=value")],
    task: Annotated[list[str] | None, typer.Option(help="a recipe: the tasks in the order of learning")] = None,
    untrained: Annotated[list[str] | None, typer.Option(help="a recipe that no checkpoint learned from")] = None,
    k: Annotated[int, typer.Option(min=1, help="the k of pass@k that is the accuracy")] = 1,
    out: Annotated[Path, typer.Option(help="the folder of all cells; the same command goes on in it")] = Path(
        "runs/continual"),
) -> None:
    """A sequence of checkpoints on a sequence of tasks: accuracy matrix, forgetting and transfer, with intervals."""
    from selftaught.studies import continual as sequence

    typer.echo(sequence.run([name for name in models if "=" not in name], task or [], out, _say, k=k,
                            untrained=untrained or [], overrides=[name for name in models if "=" in name]))


@app.command("vllm-serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def vllm_serve(context: typer.Context,
               model: Annotated[str, typer.Argument(help="a model's folder, a Hub name or quickstart")]) -> None:
    """Serve a model to runs with `rollout.engine: vllm` and this server's address as `rollout.vllm.url`.

    Further options are vLLM's own, such as --port 8001 --dtype bfloat16 --tensor-parallel-size 2 --max-model-len 4096.
    """
    from selftaught.engines import serve

    serve(model, context.args)


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(help="run folders; several are overlaid")],
           out: Annotated[Path | None, typer.Option(help="the HTML file to write; with --pictures, the folder")] = None,
           pictures: Annotated[bool, typer.Option("--pictures", help="pass@k, diversity, entropy and controls as "
                                                  "pictures, and a page of them")] = False) -> None:
    """Curves, tables and samples of one run or several, as one HTML file."""
    if pictures:
        from selftaught.pictures import write_pictures

        place = out or (runs[0] if len(runs) == 1 else Path()) / "pictures"
        typer.echo(f"pictures: {write_pictures(runs, place, _warn)}")
        return
    from selftaught.report import write_report

    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    typer.echo(f"report: {write_report(runs, path)}")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="; ".join(f"{name}: {what}" for name, what in STUDIES.items()))],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the study's folder; runs/NAME if not given")] = None,
    only: Annotated[str | None, typer.Option(help="some of its parts (methods, laws, arms), with commas")] = None,
    seeds: Annotated[str | None, typer.Option(help="with commas; by default those of the study, one or three")] = None,
    jobs: Annotated[int | None, typer.Option(help="runs at a time; by default one per processor, at most 4")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="cut short, to see that all of it works")] = False,
) -> None:
    """A whole experiment; the same command goes on where it was stopped."""
    typer.echo(start(name, out, _say, only=only.split(",") if only else None, jobs=jobs, smoke=smoke,
                     seeds=_ladder(seeds, "--seeds") if seeds else None, overrides=overrides))


def _dry_run(run: Any, resume: bool) -> None:
    """The resolved run as YAML, which is a recipe again, with the forecast as comments; starts nothing.

    What is on the Hub is not looked at while the Hub is out of reach; the comments say so.
    """
    import yaml

    from selftaught.assemble import lay_ground
    from selftaught.forecast import forecast
    from selftaught.report import refuse_taken

    notes: list[str] = []
    try:
        refuse_taken(Path(run.out), resume=resume)
    except UserError as error:  # the recipe may be wanted all the same
        notes.append(str(error))
    try:
        ground = lay_ground(run, notes.append)
        if ground.rewarder is not None:
            ground.rewarder.close()
        notes += forecast(ground).lines()
    except Unreachable as error:
        notes += [f"not looked at: {error}", "so prompts, columns, privileges, tokens and memory are not checked"]
    typer.echo(yaml.safe_dump(run.resolved(), sort_keys=False, allow_unicode=True), nl=False)
    for line in notes:
        typer.echo(f"# {line}")


def _say(text: str) -> None:
    typer.echo(text)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _ladder(text: str, flag: str = "--k") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text!r}: give whole numbers with commas, for example 1,4,8") from None


def _measures(found: dict[str, Any]) -> Table:
    table = Table("measure", "value", "95 % interval", box=None, pad_edge=False)
    for name, measure in found.items():
        if isinstance(measure, dict) and measure.get("value") is not None:
            interval = f"[{measure['low']:.3f}, {measure['high']:.3f}]" if measure.get("low") is not None else ""
            if "answer" in measure:
                interval = f"answer {measure['answer']!r}"
            table.add_row(name, f"{measure['value']:.3f}", interval)
        elif name == "status":
            for status, times in measure.items():
                table.add_row(f"responses {status}", str(times), "")
        elif isinstance(measure, int):
            table.add_row(name, str(measure), "")
    return table


def _differences(found: dict[str, Any]) -> Table:
    columns = ("measure", "first", "second", "difference", "p sign", "p permuted")
    table = Table(*columns, box=None, pad_edge=False, caption_justify="left")
    for name, each in found.items():
        if isinstance(each, int):
            table.add_row(name, str(each))
        elif each["value"] is not None:
            if not each["exact"]:
                table.caption = f"* of {each['patterns']} random patterns of signs; without it, all were counted"
            change = f"{each['value']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]"
            table.add_row(name, f"{each['before']:.3f}", f"{each['after']:.3f}", change, f"{each['p']:.3g}",
                          f"{each['p_permutation']:.3g}{'' if each['exact'] else ' *'}")
    return table


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from error


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch then asks for huge pages: a fresh tensor of 20 MB, as a chunk of logits is, costs a third.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Threads that spin long while they wait make a step ten times slower as soon as anything else wants the processor;
    # threads that do not spin at all make decoding, whose operations are short, a quarter slower on a quiet machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app(prog_name="selftaught")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # what nobody closer to it has put into words
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(f"error: {place}{error.strerror or error}; see that it exists, may be read or written, and that the "
                   "disk has room", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
