"""`python -m parablock`, the same as the command `parablock`."""

from parablock.cli.main import main

if __name__ == "__main__":
    main()
