"""The instruments: where the error of a teacher and its student comes from, and where in the image it sits."""
