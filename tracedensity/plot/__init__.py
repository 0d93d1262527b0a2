"""Figures: each takes a result of the library and returns a plotly figure; nothing is computed here."""

from tracedensity.plot.attention import plot_attention, plot_top
from tracedensity.plot.circuit import plot_circuit
from tracedensity.plot.comparison import plot_curves
from tracedensity.plot.component import plot_component
from tracedensity.plot.composition import plot_composition
from tracedensity.plot.curve import plot_curve
from tracedensity.plot.difference import plot_difference
from tracedensity.plot.growth import plot_growth
from tracedensity.plot.heatmap import plot_heatmap
from tracedensity.plot.page import figures_page, write_figure, write_html
from tracedensity.plot.report import activations_page, density_page, report_page
from tracedensity.plot.strip import Strip, density_strip
from tracedensity.plot.theme import Theme, dark

__all__ = [
    "Strip",
    "Theme",
    "activations_page",
    "dark",
    "density_page",
    "density_strip",
    "figures_page",
    "plot_attention",
    "plot_circuit",
    "plot_component",
    "plot_composition",
    "plot_curve",
    "plot_curves",
    "plot_difference",
    "plot_growth",
    "plot_heatmap",
    "plot_top",
    "report_page",
    "write_figure",
    "write_html",
]
