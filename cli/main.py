"""The entry point: which commands there are, and how each ends.

Nothing but click is imported until a command runs, so that ``effic --help`` is immediate: the
table below holds what the help page needs, and a command's module is imported when it is called.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module:attribute, one line for the help page)
    "optimize": ("effic.cli.optimize:optimize", "Run passes over a model and write the result."),
    "show": ("effic.cli.show:show", "What is in a model: operators, sizes, weights, encodings, costs."),
    "passes": ("effic.cli.passes:passes", "List all passes, and the presets with the reason for each line."),
    "explain": ("effic.cli.explain:explain", "What one pass does, and its options."),
    "compare": ("effic.cli.compare:compare", "How far apart two models' outputs are on the same inputs."),
    "bisect": ("effic.cli.bisect:bisect", "Find the pass, and its site, that breaks a model."),
    "sensitivity": (
        "effic.cli.sensitivity:sensitivity",
        "Rank the sites of a pass by what each costs alone.",
    ),
    "reproduce": ("effic.cli.reproduce:reproduce", "Build a model again from its record, and compare."),
    "report": ("effic.cli.report:report", "Show what was done to a model, as one HTML file."),
    "tune": ("effic.cli.tune:tune", "Measure how a model's kernels are best made on this machine."),
    "bench": ("effic.cli.bench:bench", "Time a model, or one against another."),
    "capture": ("effic.cli.capture:capture", "Turn a torch module into an ONNX file (runs your code)."),
    "extract-lora": ("effic.cli.extract_lora:extract_lora", "What fine-tuning changed, as a LoRA adapter."),
    "gate": ("effic.cli.gate:gate", "Hold models to the budgets of effic.toml; for CI."),
}

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


class LazyGroup(click.Group):
    """A group whose commands are imported when called, and whose errors are one sentence each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        import importlib

        from effic.cli.put_off import put_off_imports

        put_off_imports()
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from effic.passes import near

            ctx.fail(f"there is no command '{name}'{near(name, list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        args = list(sys.argv[1:] if args is None else args)
        _tolerate_narrow_encodings()
        try:
            code = super().main(args, prog_name or "effic", complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            # Its message is the help page, which is no sentence about an error.
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code, args, getattr(error, "ctx", None))
        except (click.Abort, KeyboardInterrupt):
            again = "; the same command goes on from here" if "--resume" in args else ""
            _fail(f"interrupted; no half-written file was left behind{again}", INTERRUPTED, args)
        except BrokenPipeError:
            _quit_after_broken_pipe()
        except OSError as error:
            if error.errno == errno.EPIPE:
                _quit_after_broken_pipe()
            where = f"'{error.filename}': " if error.filename else ""
            _fail(f"{where}{error.strerror or error}; check the path, its permissions and the disk", 2, args)
        except _effic_error() as error:
            _fail(str(error), error.exit_code, args)
        sys.exit(code if isinstance(code, int) else 0)


def _effic_error() -> Any:
    # Evaluated only when an exception has reached that line, so that --help stays free of it.
    from effic.ir.errors import EfficError

    return EfficError


def _tolerate_narrow_encodings() -> None:
    # A pipe on a system whose encoding lacks "→" must not turn a result into a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _fail(message: str, code: int, args: Sequence[str], ctx: click.Context | None = None) -> NoReturn:
    """Say the sentence on stderr (and as JSON on stdout when that was asked for), and leave."""
    from effic.cli.console import tame

    click.echo(f"effic: error: {tame(message)}", err=True)
    if ctx is not None:
        click.echo(f"Try '{ctx.command_path} --help'.", err=True)
    if "--json" in args:
        import json

        click.echo(json.dumps({"error": message, "exit_code": code}))
    sys.exit(code)


def _quit_after_broken_pipe() -> NoReturn:
    # The reader (head, less) has seen enough. The interpreter flushes stdout once more on its way
    # out: let that go nowhere instead of complaining.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a check or budget failed, 2 bad usage or bad input, "
    "3 not measured or an extra is missing.",
)
@click.version_option(package_name="effic", prog_name="effic")
def main() -> None:
    """Compiler passes for neural networks: a model goes in, a smaller or faster one comes out, and
    every step says what it did, why it did not, and how far it moved the numbers."""


if __name__ == "__main__":
    main()
