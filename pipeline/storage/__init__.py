"""What lies in a run folder, written whole or not at all: checkpoints, metrics, status, lock. Imports `schema` and
`config`.
"""
