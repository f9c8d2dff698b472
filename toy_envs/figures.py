"""Figures in one style: the same name has the same colour in every picture of the project.

The palette is Okabe and Ito's, which the colour-blind can tell apart and which stays legible in
grey. matplotlib is an extra: it is imported when the first figure is drawn, not before.
"""

from pathlib import Path

COLORS = {
    # reward models
    "init-sft": "#0072B2", "init-demo": "#E69F00", "sft-demo": "#D55E00",
    "preference": "#009E73", "log-ratio": "#56B4E9",
    # controls and policies
    "golden": "#000000", "length": "#CC79A7", "random": "#999999",
    "init": "#999999", "sft": "#0072B2", "demo": "#E69F00",
    # divergences
    "reverse_kl": "#D55E00", "forward_kl": "#0072B2", "jensen_shannon": "#009E73",
    "total_variation": "#CC79A7", "pearson_chi2": "#56B4E9", "neyman_chi2": "#E69F00",
    "squared_hellinger": "#000000",
}


def pyplot():
    """matplotlib.pyplot with the project's style and a file-only backend.

    Raises ImportError, with the command that mends it, where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "figure.dpi": 130, "savefig.dpi": 130, "font.size": 9, "axes.titlesize": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True,
    })
    return plt


def save_figure(figure, path):
    """Write the figure beside its place and rename it, so that no half picture is ever seen."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format=path.suffix[1:])
    aside.replace(path)
    pyplot().close(figure)
    return path
