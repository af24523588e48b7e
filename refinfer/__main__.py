"""Where the command line starts: `refinfer`, or `python -m refinfer`.

Imports next to nothing before `main`, and the rest inside it, so that signals are answered from its first line on.
"""

import sys

from refinfer.cli.ending import ends_well, say_interrupted


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        return ends_well(_run)
    except KeyboardInterrupt:  # it came before anything else could answer it
        return say_interrupted()


def _run() -> int:
    from refinfer.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
