"""`welore` and `python -m welore`: the command line of the interpreter at hand."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C is quiet from the first import to the end of the interpreter."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from welore.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
