"""Run the command line: ``python -m cryored``."""

from cryored.cli import main

if __name__ == "__main__":
    main()
