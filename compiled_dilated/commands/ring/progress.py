"""Long runs on the command line: a bar of tokens done, tokens per second and time left; and how they are stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ...ring.journals import JournalError
from ...ring.streamed import Progress


@contextlib.contextmanager
def token_bar(name: str, tokens: int | None = None) -> Iterator[Callable[[Progress], None]]:
    """What `Streamed` tells its progress to."""
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

        def tell(progress: Progress) -> None:
            nonlocal resumed
            if progress.resumed_ranks and not resumed:
                resumed = progress.tokens
            rate = (progress.tokens - resumed) / max(progress.seconds, 1e-9)
            bar.update(
                task, completed=progress.tokens, rate=f"{progress.tokens:,} tokens, {rate:,.0f}/s"
            )

        yield tell


@contextlib.contextmanager
def stoppable(journal_option: str) -> Iterator[None]:
    """End a command that the same command continues: exit code 130 after Ctrl-C, 1 for the disk.

    What the library refuses is bad usage, exit code 2. journal_option: the option that names the journal, for a journal that is
    refused.
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
