"""`python -m multi_token` is the command `multi-token`."""

from multi_token.cli import main

if __name__ == "__main__":
    main()
