"""`python -m xs`: the command line."""

from xs.cli import main

if __name__ == "__main__":
    main()
