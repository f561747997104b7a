"""Figures and reports of runs. The only importer of matplotlib."""
