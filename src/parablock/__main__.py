"""`python -m parablock`: the command line."""

from parablock.cli.main import main

if __name__ == "__main__":
    main()
