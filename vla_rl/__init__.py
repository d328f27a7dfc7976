"""iRe-VLA."""
