"""`compiled-dilated ring`: a program over many ranks.

commands    plan, simulate, stream and launch
billion     2**30 tokens through the schedules of many ranks
rank        one process of `launch`
processes   a command and all that it starts, which end together
progress    progress bar of tokens, and exit codes of interrupted runs
"""

from .commands import app

__all__ = ["app"]
