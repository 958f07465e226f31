"""The training algorithm: step, objective, optimizer, EMA. Takes built objects and opens no files; imports `data`,
`models`, `tracking` and below.
"""
