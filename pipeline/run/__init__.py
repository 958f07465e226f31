"""A run in its folder: built from a recipe, resumed, trained, saved. Imports everything but `inference` and the
commands.
"""
