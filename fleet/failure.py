"""The error of this folder: something that the fleet needs could not be started or reached."""

from headrace.contract.errors import HeadraceError


class FleetError(HeadraceError):
    """Text has three parts: what was asked, what was found, what to do."""

    code = "fleet"
