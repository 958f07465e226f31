"""The page of `report.py`: run folders are read without torch, thinned to what a screen shows, and written as HTML."""
