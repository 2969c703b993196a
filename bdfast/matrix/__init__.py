"""Grids of networks, data, attacks, shares of clean data, defenses and seeds: cells, records, resume, tables."""

from bdfast.matrix.cells import Cell
from bdfast.matrix.feasibility import check_grid
from bdfast.matrix.grid import Grid, parse_grid, read_grid
from bdfast.matrix.places import GridError
from bdfast.matrix.records import read_records
from bdfast.matrix.running import RunSummary, run_grid

__all__ = [
    "Cell",
    "Grid",
    "GridError",
    "RunSummary",
    "check_grid",
    "parse_grid",
    "read_grid",
    "read_records",
    "run_grid",
]
