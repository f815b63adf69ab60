"""The flight recorder: steps kept on disk, measured again, and taken apart by the part of the model that made them."""

from step_optim.flight.attribution import Attribution, Part
from step_optim.flight.kept import KeptStep, read_flight
from step_optim.flight.recorder import FlightRecorder

__all__ = ["Attribution", "FlightRecorder", "KeptStep", "Part", "read_flight"]
