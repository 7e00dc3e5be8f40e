"""`python -m welore`: the command line of the interpreter at hand, whichever `welore` is first on the path."""

from welore.cli.main import main

if __name__ == "__main__":
    main()
