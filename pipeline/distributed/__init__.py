"""Processes and devices: the runtime with every collective, the watchdog, preemption. Imports nothing else of
pipeline.
"""
