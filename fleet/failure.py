"""The error of this folder: something that the fleet needs could not be started or reached."""


class FleetError(RuntimeError):
    """Text has three parts: what was asked, what was found, what to do."""
