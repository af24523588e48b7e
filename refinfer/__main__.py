"""Where the command line starts: `refinfer`, or `python -m refinfer`.

Imports everything inside the `try`, so that Ctrl-C is answered in one line from the first moment on.
"""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from refinfer.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("refinfer: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
