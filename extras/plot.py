"""matplotlib, imported only where a picture is drawn."""


def pyplot():
    """matplotlib.pyplot without a screen. ValueError if matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install matplotlib") from None
    return matplotlib.pyplot
