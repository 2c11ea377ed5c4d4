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


CHINESE_FONTS = """
    Noto Sans CJK SC, Noto Sans CJK JP, Source Han Sans CN, WenQuanYi Micro Hei, SimHei, PingFang SC
    """.strip().split(", ")


def has_chinese_font(plt):
    """Whether there is a font with Chinese characters; then pictures are drawn with it."""
    from matplotlib.font_manager import fontManager

    fonts = sorted(set(CHINESE_FONTS) & {font.name for font in fontManager.ttflist})
    if fonts:
        plt.rcParams["font.sans-serif"] = fonts
    return bool(fonts)
