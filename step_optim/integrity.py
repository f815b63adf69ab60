"""Did the conditions of a study differ at all? ``python -m step_optim integrity``; see `telemetry.integrity`."""

from step_optim.telemetry.integrity import Report, check

__all__ = ["Report", "check"]

if __name__ == "__main__":  # python -m step_optim.integrity
    import sys

    from step_optim.__main__ import main

    sys.exit(main(["integrity", *sys.argv[1:]]))
