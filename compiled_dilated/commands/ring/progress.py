"""Progress bar and interruption of long runs on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ...ring.journals import JournalError
from ...ring.streamed import Progress


@contextlib.contextmanager
def token_bar(name: str, tokens: int | None = None) -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar on stderr; yields its `on_progress` callback.

    name: the bar's label.
    tokens: length of the sequence.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=tokens, rate="")
        resumed = 0

        def update(progress: Progress) -> None:
            nonlocal resumed
            # Tokens of an earlier run do not count for the rate.
            if progress.resumed_ranks and not resumed:
                resumed = progress.tokens
            rate = (progress.tokens - resumed) / max(progress.seconds, 1e-9)
            text = f"{progress.tokens:,} tokens, {rate:,.0f}/s"
            bar.update(task, completed=progress.tokens, rate=text)

        yield update


@contextlib.contextmanager
def stoppable(journal_option: str) -> Iterator[None]:
    """Turn errors of a resumable run into exit codes.

    130 after Ctrl-C, 1 for an error of the disk, 2 for arguments or a journal that are refused.

    journal_option: the option that names the journal, for the error message.
    """
    import typer

    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    except JournalError as error:
        raise typer.BadParameter(f"{error.fault}. {error.remedy(journal_option)}") from None
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        typer.echo(f"stopped: {error}", err=True)
        raise typer.Exit(1) from None
