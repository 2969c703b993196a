"""`python -m bdfast` is the `bdfast` command."""

from bdfast.cli import main

if __name__ == "__main__":
    main()
