"""The web page: `python -m bitgen.demo`.

What it does is in `actions`, how it looks in `page`, its settings in `settings`.
"""
