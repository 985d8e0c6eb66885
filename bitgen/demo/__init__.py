"""The web page: `python -m bitgen.demo`.

`actions` has what it does, `page` its layout, and `settings` its settings.
"""
