"""Scripts that made files of previous versions run with those versions only."""

# Doctest would import them.
collect_ignore_glob = ["make_*.py"]
