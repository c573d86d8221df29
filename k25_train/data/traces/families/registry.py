"""Families of tasks by name."""

from collections.abc import Mapping

from k25_train.data.traces.families import colours, objects, reading, space
from k25_train.data.traces.task import Family

FAMILIES: Mapping[str, Family] = {
    "pixel_count": colours.pixel_count,
    "largest_colour": colours.largest_colour,
    "darkest_quarter": colours.darkest_quarter,
    "count": objects.count,
    "box": objects.box,
    "distance": objects.distance,
    "difference": objects.difference,
    "display": reading.display,
    "chart": reading.chart,
    "gauge": reading.gauge,
    "turned": space.turned,
    "maze": space.maze,
}
"""In the order in which traces take turns. A new one goes to the end."""
