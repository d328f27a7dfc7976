"""Bridges to other robot-learning libraries: one file each, none imported by the rest of the package."""
