"""A trained model in use: loading, sampling, editing, reports. Imports everything but the commands."""
