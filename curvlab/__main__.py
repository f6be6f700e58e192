"""Run the command: `python -m curvlab`."""

from curvlab.study.command import main

if __name__ == "__main__":
    raise SystemExit(main())
