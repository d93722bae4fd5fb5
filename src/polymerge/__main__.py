"""`python -m polymerge` is the `polymerge` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
