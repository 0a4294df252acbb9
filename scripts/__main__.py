"""`python -m scripts VERB`: the command line without installation."""

from scripts.cli import main

if __name__ == "__main__":
    main()
