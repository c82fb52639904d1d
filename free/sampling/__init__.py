"""The two samplers. ``window.py`` is one round, and the file to read first; ``samplers.py`` has the doors."""
