"""Data sets on disk: what a folder holds, read and written. Nothing here knows a network."""
