"""`python -m jaxdistill` is the console script."""

from jaxdistill.cli import entry

if __name__ == "__main__":
    entry()
