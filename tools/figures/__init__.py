"""The figures of docs/, each drawn from the library's own objects (tools/draw_figures.py)."""
