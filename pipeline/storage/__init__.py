"""The files of a run folder, each complete or absent: checkpoints, metrics, status, lock. Imports `schema` and
`config`.
"""
