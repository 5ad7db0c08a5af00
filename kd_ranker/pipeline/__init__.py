"""What the commands do, from a config to the files in a workdir.

Rankers: those to train (`trainees.py`), with their teacher (`job.py`), and trained (`trained.py`).
Steps: build or open a dataset (`datasets.py`), train one program (`training.py`, perhaps from an
earlier run, `warm_start.py`) or a sweep of them (`sweeping.py`), measure (`measure.py`), score
(`scoring.py`, `scores.py`) and export (`exporting.py`). Places: workdirs at URLs (`remote.py`), and
machines of a cluster (`cluster.py`).
"""
