"""The main job: a recipe becomes a run folder with adapters, results and a report.

Reading order: `story.py` (all of it, from top to bottom), `folder.py` (what a run folder holds, and
whose it is), `claim.py` (held against other runs), `launch.py` (several processes), `plan.py` (what
a run will do), `machine.py` (where), `parallel.py` and `placement.py` (a whole model in each
process, or a part), `materials.py` (the backbone and the data), `remeasurement.py` (`recycle
eval`), `asked.py` and `examination.py` (the same on tasks and other data). What `folder.py` and
`asked.py` need is imported in a blink, so that what they refuse is told at once.
"""
