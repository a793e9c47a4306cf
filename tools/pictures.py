"""matplotlib for the tools that draw, without a screen."""

from types import ModuleType

from qlite.errors import MachineError


def open_pyplot() -> ModuleType:
    """Return matplotlib.pyplot, made to write files only.

    Raises:
        MachineError: there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MachineError("no picture was drawn, for matplotlib is not installed: pip install matplotlib, and the same again") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
