"""Sharpness that can be measured: at a radius, by the Hessian's spectrum, and along lines and planes through the weights."""

from .batches import batch_loss
from .directions import filter_normalized, random_direction
from .estimate import Estimate
from .hessian import EigenvaluesNotConverged, Spectrum, alignment, hessian_trace, top_eigenvalues
from .landscape import along, between, plane
from .radius import WorstDirection, ascent_sharpness, average_sharpness, worst_sharpness
from .report import SharpnessReport, measure
from .sections import Line, Plane
from .surface import LossSurface, Point

__all__ = [
    "EigenvaluesNotConverged",
    "Estimate",
    "Line",
    "LossSurface",
    "Plane",
    "Point",
    "SharpnessReport",
    "Spectrum",
    "WorstDirection",
    "alignment",
    "along",
    "ascent_sharpness",
    "average_sharpness",
    "batch_loss",
    "between",
    "filter_normalized",
    "hessian_trace",
    "measure",
    "plane",
    "random_direction",
    "top_eigenvalues",
    "worst_sharpness",
]
