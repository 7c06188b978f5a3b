"""The main job: a recipe becomes a run folder with adapters, results and a report.

Reading order: `story.py` (all of it, from top to bottom), `folder.py` (what a run folder holds, and
whose it is), `plan.py` (what a run will do), `machine.py` (where), `materials.py` (the backbone and
the data), `remeasurement.py` (`recycle eval`), `asked.py` and `examination.py` (the same on
tasks and other data). What `folder.py` and `asked.py` need is imported in a blink, so that what
they refuse is told at once.
"""
