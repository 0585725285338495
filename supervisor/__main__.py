"""The command begins here. Ctrl-C ends it without a word while the rest is imported and the settings are read; `up`
and `job` have handlers of their own. Process 1 of a container does not even get a signal that it does not handle."""

import os
import signal
import sys


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM) if os.getpid() == 1 else (signal.SIGINT,):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    from supervisor import cli  # noqa: PLC0415  # it takes a tenth of a second

    cli.main()


if __name__ == "__main__":
    main()
