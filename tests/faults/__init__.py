"""The fault campaign: what a step, a log and a checkpoint do when something goes wrong.

``python -m tests.faults`` runs all of it and prints how many cases there were; ``tests/faults/test_campaign.py`` runs a
seeded part. Kinds of cases, each with a name by which it can be run alone (``--case NAME``):

- ``line``: an exception, a KeyboardInterrupt or an out-of-memory error at a line of step_optim, or a signal that
  arrives between two bytecodes;
- ``kill``: SIGKILL before, in the middle of, and after every write, fsync and rename of a run with checkpoints;
- ``value``: gradients, losses, optimizer states and weights that are not finite;
- ``log``, ``disk``: damaged logs, and a disk that is full;
- ``checkpoint``: damaged checkpoints.

Everything ends bit for bit at theta_t or theta_t+1, and the steps that follow end where those of an undisturbed run do.
"""
